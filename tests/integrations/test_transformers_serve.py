"""`transformers serve` on a saved folder: streams to OpenAI's client, 16 at once, some cancelled."""

import os
import random
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from flexdma.integrations.transformers import from_pretrained
from tests.integrations.hf_folders import folder, tokenizer

from transformers import AutoModelForCausalLM  # isort: skip  # after hf_folders, which keeps it offline

pytestmark = pytest.mark.slow

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

NEW, REQUESTS, CANCELLED_AFTER = 60, 16, 5


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@contextmanager
def server(path, *options):
    """The process of `transformers serve PATH` and a client of it."""
    port = free_port()
    command = "from transformers.cli.transformers import main; main()"
    with open(path / "log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", command, "serve", str(path), "--trust-remote-code", "--device", "cpu",
             "--host", "127.0.0.1", "--port", str(port), *options],
            env={**os.environ, "HF_MODULES_CACHE": str(path / "modules")}, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        for _ in range(600):
            assert process.poll() is None, (path / "log").read_text()[-2000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health").close()
                break
            except OSError:
                time.sleep(0.2)
        yield process, openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    finally:
        process.terminate()
        process.wait()


def streamed(client, model, prompt, cancel=False):
    """The text that the server streams; up to a few pieces of it where the client hangs up."""
    stream = client.chat.completions.create(
        model=str(model), messages=[{"role": "user", "content": prompt}], stream=True, temperature=0, max_tokens=NEW,
    )  # fmt: skip
    pieces = []
    for chunk in stream:
        pieces.append(chunk.choices[0].delta.content or "")
        if cancel and len(pieces) > CANCELLED_AFTER:
            stream.close()
            break
    return "".join(pieces)


def resident(process):
    with open(f"/proc/{process.pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def expected(model, prompt):
    words = tokenizer()
    ids = words(prompt, return_tensors="pt").input_ids
    return words.decode(
        model.generate(ids, do_sample=False, max_new_tokens=NEW)[0, ids.shape[1] :], skip_special_tokens=True
    )


def test_it_streams_what_generate_returns_in_flat_memory(tmp_path):
    path = folder(tmp_path / "model")
    choose = random.Random(0)
    prompts = ["".join(choose.choices("abcdefghij klmnop", k=choose.randint(5, 60))) for _ in range(REQUESTS)]
    model = from_pretrained(path)
    want = [expected(model, prompt) for prompt in prompts]
    assert want != [expected(AutoModelForCausalLM.from_pretrained(path), prompt) for prompt in prompts]  # without gates
    sizes = []
    with server(path) as (process, client), ThreadPoolExecutor(REQUESTS) as pool:
        for _ in range(4):
            jobs = [pool.submit(streamed, client, path, prompt, row % 4 == 3) for row, prompt in enumerate(prompts)]
            for row, job in enumerate(jobs):
                got = job.result()
                assert want[row].startswith(got) if row % 4 == 3 else got == want[row]
                assert got
            sizes.append(resident(process))
    assert max(sizes[1:]) - sizes[1] < 10e6, sizes


def test_continuous_batching_is_refused_by_name(tmp_path):
    path = folder(tmp_path / "model")
    with server(path, "--continuous-batching") as (_, client), pytest.raises(openai.InternalServerError):
        streamed(client, path, "abc")
    assert "continuous batching: expected a cache that keeps every key" in (path / "log").read_text()
