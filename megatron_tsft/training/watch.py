"""What every step is asked when it is over: did it train anything, is each number finite, does
somebody want the run to stop."""

import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_tsft import console
from megatron_tsft.errors import UserError
from megatron_tsft.model.poisoned import NOTHING_SAVED, poisoned, rank
from megatron_tsft.training.stop_signals import StopSignals

SHOWN = 4  # packs of a step, in a message
SPIKE_STEPS = 20  # whose median a spike is compared with
SAID_AT = (1, 10, 100, 1000, 10000)  # lengths of a row of steps without effect that are said


class Watch:
    """A run's steps, on one rank.

    Attributes:
        step: that is made, from 1.
        learning_rate: that the step was made with; Megatron logs the next one's.
        trained: steps that changed weights.
        updated: steps that the optimizer made, also with a gradient of zero.
    """

    def __init__(
        self,
        conversations: Callable[[], Sequence[str]],
        signals: StopSignals,
        *,
        objective: str,
        spike: float = 0.0,
    ):
        """
        Args:
            conversations: what the micro-batches of this step held, on this rank.
            signals: that ask for a stop.
            objective: for messages.
            spike: stop at a negative log-likelihood of so many times its median; 0 is never.
        """
        self._conversations, self._signals, self._objective = conversations, signals, objective
        self._spike, self._nll = spike, deque[float](maxlen=SPIKE_STEPS)
        self.learning_rate: float | None = None
        self.trained = self.updated = self.step = self._steps = self._idle = 0
        self._why = ""
        self._problem = ""

    def before(self, step: int, learning_rate: float | None) -> None:
        """A step begins; `step` counts from 1."""
        self.step, self.learning_rate = step, learning_rate
        self._signals.training = True

    def failed(self, error: RuntimeError) -> UserError | None:
        """The error for a person, of Megatron's own for a gradient that is not finite
        (core/rerun_state_machine.py, validate_result)."""
        text = str(error)
        if "Unexpected result" not in text or "local grad norm" not in text:
            return None
        value = text.partition("Unexpected result ")[2].partition(" ")[0]
        found = self._conversations()
        more = [f"and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
        what = f"the gradient of its micro-batches is {value}"
        return poisoned(self.step, what, [*found[:SHOWN], *more])

    def after(
        self, losses: dict[str, Tensor], skipped: bool, grad_norm: float | Tensor | None
    ) -> None:
        """A step is made, and nothing of it saved.

        Args:
            losses: the reduced metrics; empty but on the last pipeline stage.
            skipped: fp16's loss scale was too large for it.
            grad_norm: of all ranks; None where it was skipped.
        """
        self._steps += 1
        self.updated += not skipped
        norm = None if grad_norm is None else float(grad_norm)
        if norm is not None and not math.isfinite(norm):
            self._problem = (
                f"step {self.step}: the gradient norm of all ranks is {norm}: {NOTHING_SAVED};"
                " lower --lr"
            )
        elif skipped:
            self._without_effect("was skipped: its gradients overflow fp16 at this loss scale")
        elif norm == 0:
            self._without_effect(
                f"has a gradient of zero: {self._objective} asks nothing of the model that it does"
                " not say already"
            )
        else:
            self._end_of_idleness()
            self.trained += 1
        if self._spike and (nll := losses.get("nll")) is not None:
            self._look_for_spike(float(nll))

    def stop_asked(self, device: torch.device | str) -> bool:
        """Whether any rank was asked to stop; one small all-reduce.

        Raises:
            UserError: something is wrong with this step, on all ranks alike.
        """
        number, wrong = largest([self._signals.received or 0, bool(self._problem)], device)
        if wrong:
            raise agreed_error(self._problem)
        if number:
            self._signals.received = number
        return bool(number)

    def check_finite(
        self, model: Sequence[Any], optimizer: Any, device: torch.device | str
    ) -> None:
        """Before a save: raise UserError, on all ranks alike, where a parameter or the optimizer's
        state holds a number that is not finite."""
        name = first_not_finite(model, optimizer)
        text = ""
        if name:
            text = (
                f"step {self.step}, rank {rank()}: {name} holds numbers that are"
                f" not finite: {NOTHING_SAVED}; lower --lr"
            )
        if any(largest([bool(text)], device)):
            raise agreed_error(text)

    def check_trained(self, *, anew: bool) -> None:
        """The run is over: raise UserError where no step had an effect.

        anew: it did not go on from a checkpoint, where one step may be left and be skipped.
        """
        self._end_of_idleness()
        if self._steps and not self.trained and (anew or "zero" in self._why):
            raise UserError(
                f"nothing was trained: each of {self._steps} steps {self._why}"
                f" ({self._objective}); choose another objective, teacher or precision"
            )

    def _without_effect(self, why: str) -> None:
        if self._idle and why != self._why:
            self._end_of_idleness()
        self._idle, self._why = self._idle + 1, why
        if self._idle in SAID_AT and rank() == 0:
            times = "" if self._idle == 1 else f" (and {self._idle - 1} before it)"
            console.say(f"WARNING: step {self.step}{times} {why}")

    def _end_of_idleness(self) -> None:
        if self._idle > 1 and rank() == 0:
            console.say(f"{self._idle} steps had no effect: each {self._why}")
        self._idle = 0

    def _look_for_spike(self, nll: float) -> None:
        if len(self._nll) == self._nll.maxlen:
            usual = statistics.median(self._nll)
            if nll > self._spike * usual:
                self._problem = (
                    f"step {self.step}: the negative log-likelihood is {nll:.4g}, more than"
                    f" {self._spike:g} times {usual:.4g}, the median of the {SPIKE_STEPS} steps"
                    f" before (--tsft-stop-at-spike): {NOTHING_SAVED}; lower --lr, or look at"
                    f" {'; '.join(self._conversations()[:SHOWN])}"
                )
        self._nll.append(nll)


def first_not_finite(model: Sequence[Any], optimizer: Any) -> str:
    """The first of this rank's parameters, or of the optimizer's tensors, with a number that is not
    finite; "" for none. One number of each is brought to the host, all at once."""
    named: list[tuple[str, Tensor]] = []
    for chunk in model:
        named += [(f"parameter {name}", p.detach()) for name, p in chunk.named_parameters()]
    for number, part in enumerate(getattr(optimizer, "chained_optimizers", [optimizer])):
        inner: Any = getattr(part, "optimizer", None)
        for group in getattr(inner, "param_groups", ()):
            for i, p in enumerate(group["params"]):
                place = f"of the optimizer's parameter {i} of {number}"
                named.append((f"the main weight {place}", p.detach()))
                state = inner.state.get(p, {})
                named += [
                    (f"{key} {place}", value)
                    for key, value in state.items()
                    if isinstance(value, Tensor)
                ]
    # of Transformer Engine's 8-bit tensors the optimizer holds the main weights
    named = [
        (name, tensor)
        for name, tensor in named
        if tensor.numel() and not hasattr(tensor, "_quantizer") and tensor.is_floating_point()
    ]
    if not named:
        return ""
    ends = [
        torch.stack(torch.aminmax(tensor.float() if tensor.dtype.itemsize == 1 else tensor)).float()
        for _, tensor in named
    ]
    whole = torch.isfinite(torch.stack([end.to(ends[0].device) for end in ends])).all(1)
    wrong = torch.nonzero(~whole)[:, 0].tolist()
    return named[wrong[0]][0] if wrong else ""


def largest(numbers: Sequence[int], device: torch.device | str) -> list[int]:
    """Of each number the largest of all ranks; one small all-reduce."""
    word = torch.tensor(numbers, dtype=torch.int32, device=device)
    if _several():
        torch.distributed.all_reduce(word, op=torch.distributed.ReduceOp.MAX)
    return word.tolist()


def agreed_error(text: str) -> UserError:
    """The error that all ranks raise: the first one's that has a text."""
    texts: list[Any] = [text]
    if _several():
        texts = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(texts, text)
    error = UserError(next(filter(None, texts)))
    error.met_by_all = True
    return error


def _several() -> bool:
    return torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
