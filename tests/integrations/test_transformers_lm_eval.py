"""lm_eval on a saved folder: a task with local texts."""

import json

import pytest
import torch

from flexdma.integrations.transformers import from_pretrained
from tests.integrations.hf_folders import folder, tokenizer

pytestmark = pytest.mark.slow
lm_eval = pytest.importorskip("lm_eval")

TASK = """
task: local_texts
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/texts.jsonl}, cache_dir: FOLDER/cache}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: bits_per_byte
"""


@pytest.mark.filterwarnings("ignore")  # of lm_eval and the packages that it brings
def test_a_local_task_gives_the_perplexity_of_the_converted_model(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    path = folder(tmp_path / "model")
    texts = ["".join(chr(97 + number * step % 26) for number in range(50)) for step in (3, 5, 7)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "local_texts.yaml").write_text(TASK.replace("FOLDER", str(tmp_path)))
    results = lm_eval.simple_evaluate(
        model="hf", model_args={"pretrained": str(path), "trust_remote_code": True, "dtype": "float32"}, device="cpu",
        tasks=["local_texts"], batch_size=1,
        task_manager=lm_eval.tasks.TaskManager(include_path=str(tmp_path), include_defaults=False),
    )["results"]["local_texts"]  # fmt: skip

    model, words, bits = from_pretrained(path), tokenizer(), 0.0
    for text in texts:
        ids = torch.tensor([[words.bos_token_id, *words(text).input_ids]])
        with torch.no_grad():
            chances = model(ids).logits.double().log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])
        bits -= chances.sum().item() / torch.log(torch.tensor(2.0)).item()
    assert results["bits_per_byte,none"] == pytest.approx(bits / sum(map(len, texts)), rel=1e-5)
