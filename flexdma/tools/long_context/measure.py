"""All measures of several contenders, as one table of records: (section, shape, contender, metric, value).

The column `shape` has the name of a case, and `about["cases"]` what it consists of:

    section    case                                               metrics
    nll        text, stretch, first, last (range of positions)    nll: the mean over these tokens, in nats
    needles    kind, length, depth, seed                          exact: 0 or 1; nll: the mean over digits, in nats
    speed      length                                             those of `speed`

`about["contenders"]` has the keys per KV head of each, and from when on it is bounded.
"""

import itertools
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.functional import cross_entropy

from flexdma.tools.long_context.contenders import Contender
from flexdma.tools.long_context.needles import Needle
from flexdma.tools.long_context.plan import Material, Plan
from flexdma.tools.long_context.speed import DECODED, speed
from flexdma.tools.records import Results

Case = dict[str, Any]

NLL, NEEDLES, SPEED = "nll", "needles", "speed"
BIN = 256  # tokens of the first two ranges of positions; each further one is as long as all before it


@dataclass(frozen=True)
class Measurement:
    """Adds the records of contenders to results.  What the results have is not measured again.

    tick: called with what is done next and the tokens of the forward passes since the last call.
    save: called after each case, so that an interruption loses one case.
    """

    contenders: Sequence[Contender]
    results: Results
    tick: Callable[[str, int], None] = lambda note, tokens: None
    save: Callable[[], None] = lambda: None

    def run(self, material: Material, plan: Plan) -> None:
        """Measure everything."""
        about = self.results.about
        about.setdefault("cases", {})
        about.setdefault("contenders", {})
        about["contenders"] |= {one.name: {"keys": one.keys, "bounded": one.bounded} for one in self.contenders}
        for text, found in material.stretches.items():
            for number, stretch in enumerate(found):
                self._nll(text, number, stretch, plan.keys)
        for needle in material.needles:
            self._needle(needle)
        for length, ids in material.timed.items():
            self._speed(length, ids, plan.rounds)

    def _nll(self, text: str, number: int, ids: Tensor, keys: int) -> None:
        length, cases = ids.shape[1], stretch_cases(text, number, ids, keys)
        for one in self.contenders:
            self.tick(f"{text}: {one.name}", 0)
            missing = {name: case for name, case in cases.items() if not self._has(NLL, name, one)}
            values = one.nll(ids) if missing else None
            for name, case in missing.items():
                if values is None:
                    break
                # The first token of all has no likelihood.
                mean = values[max(case["first"] - 1, 0) : case["last"] - 1].double().mean().item()
                self._add(NLL, name, case, [(one.name, "nll", mean)])
            self.tick(f"{text}: {one.name}", length)
        self.save()

    def _needle(self, needle: Needle) -> None:
        name, case = needle_case(needle)
        for one in self.contenders:
            self.tick(f"needle, {needle.kind}: {one.name}", 0)
            if not self._has(NEEDLES, name, one):
                exact, nll = found(one.answer(needle), needle)
                self._add(NEEDLES, name, case, [(one.name, "exact", int(exact)), (one.name, "nll", nll)])
            self.tick(f"needle, {needle.kind}: {one.name}", needle.length)
        self.save()

    def _speed(self, length: int, ids: Tensor, rounds: int) -> None:
        name = f"{length} tokens"
        # All together, because they take turns; also those with times of an earlier run.
        if not all(self._has(SPEED, name, one) for one in self.contenders):
            rows = list(
                speed(self.contenders, ids, rounds, lambda name: self.tick(f"timing, {length:,} tokens: {name}", 0))
            )
            again = {(SPEED, name, one.name) for one in self.contenders}
            self.results.records = [record for record in self.results.records if record[:3] not in again]
            self._add(SPEED, name, {"length": length, "decoded": DECODED}, rows)
        self.tick("timing", len(self.contenders) * (rounds + 1) * length)
        self.save()

    def _has(self, section: str, name: str, contender: Contender) -> bool:
        return any(record[:3] == (section, name, contender.name) for record in self.results.records)

    def _add(self, section: str, name: str, case: Case, rows: list[tuple[str, str, Any]]) -> None:
        self.results.about["cases"][name] = case
        self.results.add(section, name, rows)


def token_cases(material: Material, keys: int) -> dict[str, Case]:
    """The cases that depend on tokens, by name; keys as in the plan."""
    cases: dict[str, Case] = {}
    for text, stretches in material.stretches.items():
        for number, ids in enumerate(stretches):
            cases |= stretch_cases(text, number, ids, keys)
    return cases | dict(map(needle_case, material.needles))


def stretch_cases(text: str, number: int, ids: Tensor, keys: int) -> dict[str, Case]:
    """The ranges of positions of a stretch."""
    tokens = checksum(ids)
    return {
        f"{text}, stretch {number}, tokens {first} to {last - 1}": {
            "text": text, "stretch": number, "first": first, "last": last, "tokens": tokens,
        }
        for first, last in ranges(ids.shape[1], keys)
    }  # fmt: skip


def needle_case(needle: Needle) -> tuple[str, Case]:
    """The name of a needle and its case."""
    case = {name: getattr(needle, name) for name in ("kind", "length", "depth", "seed")}
    name = f"{needle.kind}, {needle.length} tokens, depth {needle.depth}, seed {needle.seed}"
    return name, case | {"tokens": checksum(needle.ids)}


def ranges(length: int, keys: int) -> list[tuple[int, int]]:
    """Ranges [first, last) of positions that together are 0 .. length, and then all positions from `keys` on."""
    edges, edge = [0], BIN
    while edge < length:
        edges.append(edge)
        edge *= 2
    edges.append(length)
    return [*itertools.pairwise(edges), (keys, length)]


def found(logits: Tensor, needle: Needle) -> tuple[bool, float]:
    """Whether the digits of all values are the most likely tokens, and their mean negative log-likelihood.

    logits: [a, V], each row after all tokens before it.  If the answer is one value, every digit is the most likely token
    exactly if greedy decoding writes the value; this takes one forward pass.
    """
    rows, digits = logits[needle.scored.to(logits.device)], needle.answer[needle.scored].to(logits.device)
    return bool((rows.argmax(-1) == digits).all()), cross_entropy(rows.float(), digits).item()


def checksum(ids: Tensor) -> int:
    """A number that differs for other tokens, so that two files of results can be joined only if they read the same."""
    return zlib.crc32(ids.cpu().numpy().tobytes())
