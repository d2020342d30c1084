"""Schedules by the names that other libraries have for them."""

from __future__ import annotations

from heatopt.comm import Communicator, world
from heatopt.lr_scheduler._formulas import RAMP_STYLES, LinearScaling, Ramp, WarmupDecay
from heatopt.lr_scheduler._schedule import Schedule, as_schedule, check_choice, check_number, check_whole

__all__ = ["goyal_lr", "megatron_lr", "megatron_weight_decay"]


def megatron_lr(
    max_lr: float,
    min_lr: float = 0.0,
    *,
    init_lr: float = 0.0,
    lr_warmup_steps: int = 0,
    lr_decay_steps: int,
    lr_decay_style: str = "linear",
    wsd_decay_steps: int | None = None,
    lr_wsd_decay_style: str = "exponential",
) -> WarmupDecay:
    """:class:`WarmupDecay` by the names that Megatron-LM and Hetu have for its arguments.

    Raises:
        TypeError: an argument that is no number, or no whole one.
        ValueError: a number out of its range, or an unknown style.
    """
    return WarmupDecay(
        max_lr,
        min_lr,
        decay_steps=lr_decay_steps,
        init_value=init_lr,
        warmup_steps=lr_warmup_steps,
        style=lr_decay_style,
        wsd_decay_steps=wsd_decay_steps,
        wsd_style=lr_wsd_decay_style,
    )


def megatron_weight_decay(
    start_wd: float = 0.0, end_wd: float = 0.0, *, wd_incr_steps: int = -1, wd_incr_style: str = "constant"
) -> Ramp:
    """A rising weight decay by the names that Megatron-LM and Hetu have for the arguments of :class:`Ramp`.

    Args:
        start_wd: at least 0.
        end_wd: at least ``start_wd``; equal to it for "constant".
        wd_incr_steps: at least 1 for "linear" and "cosine"; without a meaning for "constant".
        wd_incr_style: "constant", "linear" or "cosine".

    Raises:
        TypeError: an argument that is no number, or no whole one.
        ValueError: a number out of its range, or an unknown style.
    """
    check_choice("wd_incr_style", wd_incr_style, RAMP_STYLES)
    check_number("end_wd", end_wd, least=check_number("start_wd", start_wd, least=0))
    steps = check_whole("wd_incr_steps", wd_incr_steps, least=None if wd_incr_style == "constant" else 1)
    return Ramp(start_wd, end_wd, steps=max(steps, 1), style=wd_incr_style)


def goyal_lr(base_lr: float | Schedule, *, warmup_steps: int, comm: Communicator | None = None) -> LinearScaling:
    """:class:`LinearScaling` to the number of ranks of ``comm``.

    The whole recipe of the paper for ImageNet, in steps: ``goyal_lr(Milestones(0.1, (30 * epoch, 60 * epoch, 80 *
    epoch)), warmup_steps=5 * epoch)`` with ``epoch`` the steps of one epoch.

    Args:
        base_lr: the rate of one process with its own batch: a number, or a schedule.
        warmup_steps: how long it takes to get from there to that rate times the ranks; 0 for no warm-up.
        comm: the ranks; default :func:`heatopt.world`.

    Raises:
        TypeError: ``base_lr`` is neither a number nor a schedule, or ``comm`` no communicator.
        ValueError: negative ``warmup_steps``.
    """
    if comm is not None and not isinstance(comm, Communicator):
        raise TypeError(f"comm must be a heatopt.comm.Communicator or None, got {type(comm).__name__}")
    ranks = (world() if comm is None else comm).size
    return LinearScaling(as_schedule("base_lr", base_lr), ranks, warmup_steps=warmup_steps)
