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
        about["contenders"] = {one.name: {"keys": one.keys, "bounded": one.bounded} for one in self.contenders}
        for text, found in material.stretches.items():
            for number, stretch in enumerate(found):
                self._nll(text, number, stretch, plan.keys)
        for needle in material.needles:
            self._needle(needle)
        for length, ids in material.timed.items():
            self._speed(length, ids, plan.rounds)

    def _nll(self, text: str, number: int, ids: Tensor, keys: int) -> None:
        length = ids.shape[1]
        cases = {
            f"{text}, stretch {number}, tokens {first} to {last - 1}": (first, last)
            for first, last in ranges(length, keys)
        }
        for one in self.contenders:
            self.tick(f"{text}: {one.name}", 0)
            missing = [name for name in cases if not self._has(NLL, name, one)]
            values = one.nll(ids) if missing else None
            for name in missing:
                if values is None:
                    break
                first, last = cases[name]
                case = {"text": text, "stretch": number, "first": first, "last": last, "tokens": checksum(ids)}
                # The first token of all has no likelihood.
                mean = values[max(first - 1, 0) : last - 1].double().mean().item()
                self._add(NLL, name, case, [(one.name, "nll", mean)])
            self.tick(f"{text}: {one.name}", length)
        self.save()

    def _needle(self, needle: Needle) -> None:
        case = {name: getattr(needle, name) for name in ("kind", "length", "depth", "seed")}
        case["tokens"] = checksum(needle.ids)
        name = f"{needle.kind}, {needle.length} tokens, depth {needle.depth}, seed {needle.seed}"
        for one in self.contenders:
            self.tick(f"needle, {needle.kind}: {one.name}", 0)
            if not self._has(NEEDLES, name, one):
                exact, nll = found(one.answer(needle), needle)
                self._add(NEEDLES, name, case, [(one.name, "exact", int(exact)), (one.name, "nll", nll)])
            self.tick(f"needle, {needle.kind}: {one.name}", needle.length)
        self.save()

    def _speed(self, length: int, ids: Tensor, rounds: int) -> None:
        name = f"{length} tokens"
        # All together, because they take turns.
        if not all(self._has(SPEED, name, one) for one in self.contenders):
            rows = list(
                speed(self.contenders, ids, rounds, lambda name: self.tick(f"timing, {length:,} tokens: {name}", 0))
            )
            self._add(SPEED, name, {"length": length, "decoded": DECODED}, rows)
        self.tick("timing", len(self.contenders) * (rounds + 1) * length)
        self.save()

    def _has(self, section: str, name: str, contender: Contender) -> bool:
        return any(record[:3] == (section, name, contender.name) for record in self.results.records)

    def _add(self, section: str, name: str, case: dict[str, Any], rows: list[tuple[str, str, Any]]) -> None:
        self.results.about["cases"][name] = case
        self.results.add(section, name, rows)


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
