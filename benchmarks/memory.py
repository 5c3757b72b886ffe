"""Peak memory of one pass, and of the reduction in it, from the allocations in torch's profile.

The size of the process would not show it: memory that one model has freed is reused by the next.
"""

import bisect
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile, record_function

import tokendial as td
from tokendial.tokens import Tokens

_REDUCING, _FFN = "benchmarks: reducing", "benchmarks: FFN within"
_RESULT = "benchmarks: bytes of the result "


@dataclass(frozen=True, slots=True)
class Peak:
    """Peak memory of a pass in bytes, above what was allocated before."""

    whole: int
    """Peak of the whole pass: activations, and all else but weights."""
    reducing: int
    """Peak within the reduction, above what was allocated when it began; see `mark_reduction`."""


def peak_of(call: Callable[[], object], device: str = "cpu") -> Peak:
    """Run `call` once, and measure its peak memory."""
    on_cpu = device == "cpu"
    if not on_cpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        held = _Held(json.loads(path.read_text())["traceEvents"], on_cpu=on_cpu)
    whole = max(held.after) if on_cpu else torch.cuda.max_memory_allocated() - before
    return Peak(whole, held.reducing_peak())


def free_bytes(device: str) -> int:
    """Bytes of memory that are free."""
    if device != "cpu":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class _Held:
    """Allocated bytes after each allocation and release, and where the marked work lies."""

    def __init__(self, events: list[dict[str, Any]], *, on_cpu: bool) -> None:
        memory = sorted(
            (event["ts"], event["args"]["Bytes"])
            for event in events
            # Device type 0 is the CPU.
            if event.get("name") == "[memory]" and (event["args"]["Device Type"] == 0) == on_cpu
        )
        self.times = [at for at, _ in memory]
        self.after = [0]
        for _, change in memory:
            self.after.append(self.after[-1] + change)
        self.reducing, self.ffns = (
            sorted(
                self._span(event)
                for event in events
                if event.get("name") == name and event.get("cat") == "user_annotation"
            )
            for name in (_REDUCING, _FFN)
        )
        self.results = [
            self._allocation(self._span(event)[0], int(event["name"].removeprefix(_RESULT)))
            for event in events
            if event.get("cat") == "user_annotation" and event["name"].startswith(_RESULT)
        ]
        """For each result of the reduction: the index of its allocation, and its bytes."""

    def _span(self, event: dict[str, Any]) -> tuple[int, int]:
        """Indices of the first and the last state within an event."""
        first = bisect.bisect_left(self.times, event["ts"])
        return first, bisect.bisect_right(self.times, event["ts"] + event["dur"])

    def _allocation(self, state: int, size: int) -> tuple[int, int]:
        """The last allocation of at least `size` bytes before a state, with the size."""
        made = next(n for n in range(state, 0, -1) if self.after[n] - self.after[n - 1] >= size)
        return made, size

    def reducing_peak(self) -> int:
        """Largest peak of the reduction in any layer."""
        within_ffn = {n for first, last in self.ffns for n in range(first + 1, last)}
        most, begin, end = 0, 0, -1
        for first, last in self.reducing:
            # Grouping and merging follow each other directly and count as one piece of work.
            begin = begin if first == end else first
            end = last
            for n in range(begin, end + 1):
                # The tokens that leave the layer exist without a reduction, too.
                result = sum(size for made, size in self.results if begin < made <= n)
                if n not in within_ffn:
                    most = max(most, self.after[n] - self.after[begin] - result)
        return most


@contextmanager
def mark_reduction(model: td.DialViT) -> Iterator[None]:
    """Mark the work of a model's reducer in the profile, for `peak_of`.

    Marked are: its hooks before a block and between attention and FFN, the merging of tokens, and
    its work around an FFN that it runs itself, without the FFN and the tokens that leave it.
    """
    reducer = model.reducer
    if reducer is None:
        yield
        return

    def marks(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            with record_function(_REDUCING):
                return function(*args, **kwargs)

        return run

    def around(
        layer: int, degree: int, tokens: Any, attended: Any, ffn: Callable[[Any], Any]
    ) -> Any:
        def own(x: Any) -> Any:
            with record_function(_FFN):
                return ffn(x)

        with record_function(_REDUCING):
            found = type(reducer).around_ffn(reducer, layer, degree, tokens, attended, own)
            with record_function(f"{_RESULT}{found[0].nbytes}"):
                return found

    runs_ffn = type(reducer).around_ffn is not td.reduce.Reducer.around_ffn
    with (
        patch.object(Tokens, "apply_grouping", marks(Tokens.apply_grouping)),
        patch.object(reducer, "before_block", marks(reducer.before_block)),
        patch.object(reducer, "group", marks(reducer.group)),
        patch.object(reducer, "around_ffn", around if runs_ffn else reducer.around_ffn),
    ):
        yield
