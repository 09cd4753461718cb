"""What a trainer measured lately: the payload of its report, checked field by field.

Reports are for people who look at a run. Nothing that trains reads them, so a node may leave them alone.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import pairwise

from common.errors import RecordError
from protocol import limits, records_pb2
from protocol.announcements import (
    MAX_RECORD_VERSION,
    MAX_STALENESS,
    MAX_TOKENS_PER_S,
    check_length,
    check_range,
    parse_record,
)

MAX_REPORT_PAYLOAD_BYTES = 4096
MAX_EVALUATIONS = 64
MAX_BITS_PER_BYTE = 1e9
MAX_LOAD_CV = 1e6
MAX_ENTROPY_BITS = 64.0
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class TrainerReport:
    """One trainer in numbers. Losses are in bits per byte; `wire_bytes` are those of calls to hosts, both ways.

    `load_entropy_bits`, `load_cv` and `dead_experts` have one entry for each layer, or none before the first step.
    `held_out_bits_per_byte` was found when the run had seen `evaluated_tokens`, which grow.
    """

    step: int
    run_tokens: int
    train_bits_per_byte: float
    tokens_per_s: float = 0.0
    staleness: float = 0.0
    calls_ok: int = 0
    calls_failed: int = 0
    wire_bytes: int = 0
    load_entropy_bits: tuple[float, ...] = ()
    load_cv: tuple[float, ...] = ()
    dead_experts: tuple[int, ...] = ()
    evaluated_tokens: tuple[int, ...] = ()
    held_out_bits_per_byte: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        check_range("step", self.step, MAX_RECORD_VERSION)
        check_range("run_tokens", self.run_tokens, limits.MAX_RUN_TOKENS)
        check_range("train_bits_per_byte", self.train_bits_per_byte, MAX_BITS_PER_BYTE)
        check_range("tokens_per_s", self.tokens_per_s, MAX_TOKENS_PER_S)
        check_range("staleness", self.staleness, MAX_STALENESS)
        for name in ("calls_ok", "calls_failed", "wire_bytes"):
            check_range(name, getattr(self, name), MAX_RECORD_VERSION)
        self._check_layers()
        self._check_evaluations()

    def _check_layers(self) -> None:
        n_layers = len(self.load_entropy_bits)
        check_range("load_entropy_bits: layers", n_layers, limits.MAX_LAYERS)
        _check_each("load_entropy_bits", self.load_entropy_bits, n_layers, MAX_ENTROPY_BITS)
        _check_each("load_cv", self.load_cv, n_layers, MAX_LOAD_CV)
        _check_each("dead_experts", self.dead_experts, n_layers, limits.MAX_EXPERTS_PER_LAYER)

    def _check_evaluations(self) -> None:
        n_evaluations = len(self.evaluated_tokens)
        check_range("evaluated_tokens: evaluations", n_evaluations, MAX_EVALUATIONS)
        _check_each("evaluated_tokens", self.evaluated_tokens, n_evaluations, limits.MAX_RUN_TOKENS)
        _check_each("held_out_bits_per_byte", self.held_out_bits_per_byte, n_evaluations, MAX_BITS_PER_BYTE)
        if any(later <= earlier for earlier, later in pairwise(self.evaluated_tokens)):
            raise RecordError("evaluated_tokens: must grow from one evaluation to the next")


def encode_report(report: TrainerReport) -> bytes:
    """Payload of a trainer's report."""
    return records_pb2.TrainerReport(format=FORMAT, **asdict(report)).SerializeToString(deterministic=True)


def decode_report(payload: bytes) -> TrainerReport:
    """Raises RecordError naming the first field that is wrong."""
    check_length(payload, MAX_REPORT_PAYLOAD_BYTES)
    message = parse_record(records_pb2.TrainerReport, payload)
    if message.format != FORMAT:
        raise RecordError(f"format: must be {FORMAT}, is {message.format}")
    return TrainerReport(
        step=message.step,
        run_tokens=message.run_tokens,
        train_bits_per_byte=message.train_bits_per_byte,
        tokens_per_s=message.tokens_per_s,
        staleness=message.staleness,
        calls_ok=message.calls_ok,
        calls_failed=message.calls_failed,
        wire_bytes=message.wire_bytes,
        load_entropy_bits=tuple(message.load_entropy_bits),
        load_cv=tuple(message.load_cv),
        dead_experts=tuple(message.dead_experts),
        evaluated_tokens=tuple(message.evaluated_tokens),
        held_out_bits_per_byte=tuple(message.held_out_bits_per_byte),
    )


def _check_each(field: str, values: tuple[float, ...], count: int, high: float) -> None:
    if len(values) != count:
        raise RecordError(f"{field}: must have {count} entries, as the list beside it has, has {len(values)}")
    for value in values:
        check_range(field, value, high)
