"""The local-update methods with periods: each is a setting of the engine."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch

from heatopt.local import CO2Momentum, OuterFactory, SlowMomentum, SyncPlan
from heatopt.optim._local_arguments import Nested, check_number
from heatopt.optim._periodic import LocalOptions, PeriodicOptimizer

if TYPE_CHECKING:
    from typing_extensions import Unpack  # typing has it from Python 3.11 on

__all__ = ["CO2", "DiLoCo", "LocalSGD", "SlowMo"]


class LocalSGD(PeriodicOptimizer):
    r"""Train each rank alone, and average the parameters every ``sync_every`` updates.

    .. math:: x_i \leftarrow \text{step}(x_i, g_i); \qquad \text{every } H: \; x_i \leftarrow \frac1P \sum_j x_j

    Local SGD (Stich, arXiv 1805.09767), for any algorithm. With ``warmup_steps`` it is post-local SGD (Lin et al.,
    arXiv 1808.07217): gradients are averaged over all ranks until then, exactly. With ``nested`` it is hierarchical SGD
    (arXiv 2010.12998). With ``average_moments`` the optimizer's moments are averaged too, less often (DES-LOC,
    arXiv 2505.22549). With ``delay`` the averages travel while training goes on (DaSGD, arXiv 2006.00441); what is done
    meanwhile is kept: :math:`x_i \leftarrow \bar x^{(t-\tau)} + (x_i - x_i^{(t-\tau)})`.

    Construction is collective and makes all ranks equal to rank 0. ``step``, ``state_dict``, ``load_state_dict`` and
    ``add_param_group`` are collective. With one process the wrapped optimizer's step is all that happens.

    The other keyword arguments, ``model``, ``comm``, ``within``, ``average_moments``, ``wire_dtype``,
    ``error_feedback``, ``shard`` and ``timeout``, are those of all methods with periods: ``LocalOptions``.

    Args:
        torch_optimizer: any :class:`torch.optim.Optimizer`, with or without state.
        sync_every: H, updates between two averages: the option ``"sync_every"`` of the groups, which may be changed or
            driven by a schedule; it is read when a period begins.
        fragments: parts of the model that are averaged in turn, each once per period and at even distances; at most one
            for each parameter and update of a period.
        warmup_steps: updates with exactly averaged gradients before the first period.
        delay: updates between sending and merging, at most ``sync_every``; 0: wait for the average.
        outer: makes an optimizer of the parameters that all ranks share, which gets the negative mean of what the ranks
            have done as its gradient; None: the mean is taken as it is, as with SGD of learning rate 1.
        nested: groups that average more often: pairs of a communicator, or "node", and a period. Periods ascend and
            divide each other and ``sync_every``.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of range, or a parameter that another wrapper has.
        RankMismatchError: on all ranks, if their optimizers or settings differ; names the first difference.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = LocalSGD(torch.optim.SGD(model.parameters(), lr=0.1), model=model, sync_every=8)
        >>> model(torch.ones(8, 4)).sum().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        torch_optimizer: torch.optim.Optimizer,
        *,
        sync_every: int = 8,
        fragments: int = 1,
        warmup_steps: int = 0,
        delay: int = 0,
        outer: OuterFactory | None = None,
        nested: Nested = (),
        **common: Unpack[LocalOptions],
    ) -> None:
        super().__init__(
            torch_optimizer,
            sync_every=sync_every,
            outer=outer,
            warmup_steps=warmup_steps,
            delay=delay,
            fragments=fragments,
            mix="delta",
            nested=nested,
            **common,
        )


class SlowMo(PeriodicOptimizer):
    r"""Local SGD with a slow momentum: Wang et al., ICLR 2020, arXiv 1910.00643.

    Every ``sync_every`` updates, with :math:`\gamma` the learning rate of the wrapped optimizer at the time:

    .. math::
        u \leftarrow \beta u + \frac{x_{prev} - \bar x}{\gamma}, \qquad
        x_{prev} \leftarrow x_{prev} - \alpha \gamma u, \qquad x_i \leftarrow x_{prev}

    Arguments that are not explained here are those of :class:`LocalSGD`. Memory: two copies of the parameters more.

    Args:
        torch_optimizer: any :class:`torch.optim.Optimizer` whose groups have a learning rate.
        sync_every: H.
        slow_lr: :math:`\alpha`.
        slow_momentum: :math:`\beta`, 0 <= beta < 1; more ranks bear more of it.
        warmup_steps: as there.

    Raises:
        TypeError: as there.
        ValueError: as there.
        RankMismatchError: as there.
    """

    def __init__(
        self,
        torch_optimizer: torch.optim.Optimizer,
        *,
        sync_every: int = 48,
        slow_lr: float = 1.0,
        slow_momentum: float = 0.5,
        warmup_steps: int = 0,
        **common: Unpack[LocalOptions],
    ) -> None:
        rate = check_number("slow_lr", slow_lr, 0, open_low=True)
        momentum = _check_momentum("slow_momentum", slow_momentum)
        outer = partial(SlowMomentum, lr=rate, momentum=momentum)
        super().__init__(torch_optimizer, sync_every=sync_every, outer=outer, warmup_steps=warmup_steps, **common)

    def _after_update(self, plan: SyncPlan) -> None:
        if self.outer is not None:
            for anchors, group in zip(self.outer.param_groups, self.param_groups, strict=True):
                anchors["inner_lr"] = float(group["lr"])
        super()._after_update(plan)


class DiLoCo(PeriodicOptimizer):
    r"""Many local updates, then one of Nesterov's: Douillard et al., arXiv 2311.08105.

    .. math::
        \Delta = \frac1P \sum_i (\theta - \theta_i), \quad M \leftarrow \mu M + \Delta, \quad
        \theta \leftarrow \theta - \nu (\Delta + \mu M), \quad \theta_i \leftarrow \theta

    With ``fragments`` and ``delay`` it is Streaming DiLoCo (arXiv 2501.18512): each fragment is sent once per period,
    at even distances, and merged ``delay`` updates later as
    :math:`\theta_i \leftarrow (1 - \alpha) \theta + \alpha \theta_i`. With ``torch.optim.Muon`` inside it is MuLoCo
    (arXiv 2505.23725). The wrapped optimizer's state stays on its rank. Arguments that are not explained here are those
    of :class:`LocalSGD`. Memory: two copies of the parameters more.

    Args:
        torch_optimizer: any :class:`torch.optim.Optimizer`; the papers use AdamW and Muon.
        sync_every: H.
        outer_lr: :math:`\nu`.
        outer_momentum: :math:`\mu`, 0 <= mu < 1; Nesterov's where it is not 0. In the long run an outer update moves
            :math:`\nu / (1 - \mu)` times as far as the local ones have: 1.4 times with the defaults, 7 times with 0.9
            as in the paper, which is for hundreds of periods and a learning rate chosen with it.
        outer: another outer optimizer, as there; then ``outer_lr`` and ``outer_momentum`` have no meaning.
        fragments: as there.
        delay: as there.
        mix: :math:`\alpha`, the share of the local parameters in a delayed merge; or "delta", which keeps all that was
            done since the sending.
        warmup_steps: as there.

    Raises:
        TypeError: as there.
        ValueError: as there.
        RankMismatchError: as there.
    """

    def __init__(
        self,
        torch_optimizer: torch.optim.Optimizer,
        *,
        sync_every: int = 50,
        outer_lr: float = 0.7,
        outer_momentum: float = 0.5,
        outer: OuterFactory | None = None,
        fragments: int = 1,
        delay: int = 0,
        mix: float | str = 0.5,
        warmup_steps: int = 0,
        **common: Unpack[LocalOptions],
    ) -> None:
        rate = check_number("outer_lr", outer_lr, 0, open_low=True)
        momentum = _check_momentum("outer_momentum", outer_momentum)
        nesterov = partial(torch.optim.SGD, lr=rate, momentum=momentum, nesterov=momentum > 0)
        super().__init__(
            torch_optimizer,
            sync_every=sync_every,
            outer=nesterov if outer is None else outer,
            warmup_steps=warmup_steps,
            delay=delay,
            fragments=fragments,
            mix=mix,
            **common,
        )


class CO2(PeriodicOptimizer):
    r"""Local updates with averages that take a whole period to arrive: Sun et al., ICLR 2024, arXiv 2401.16265.

    After period t each rank sends how far its ``sync_every`` updates have brought it, and uses what all ranks had sent
    after the period before:

    .. math::
        u \leftarrow \text{clip}\Big(\beta u + \frac{1}{\Lambda} \frac1P \sum_i (x_{t-1,0} - x^{(i)}_{t-1,H})\Big),
        \qquad x_{t+1,0} = x_{t,0} - \alpha u

    Arguments that are not explained here are those of :class:`LocalSGD`. Memory: three copies of the parameters more.

    Args:
        torch_optimizer: any :class:`torch.optim.Optimizer`.
        sync_every: H.
        outer_lr: :math:`\alpha`.
        outer_momentum: :math:`\beta`, 0 <= beta < 1.
        gap: :math:`\Lambda`, the penalty of staleness, a constant. With 1 a period that comes close to an optimum is
            taken twice, once late; the default damps that.
        clip: largest absolute value of an element of u; None: no limit.

    Raises:
        TypeError: as there.
        ValueError: as there.
        RankMismatchError: as there.
    """

    def __init__(
        self,
        torch_optimizer: torch.optim.Optimizer,
        *,
        sync_every: int = 48,
        outer_lr: float = 1.0,
        outer_momentum: float = 0.2,
        gap: float = 2.0,
        clip: float | None = None,
        **common: Unpack[LocalOptions],
    ) -> None:
        outer: Callable[..., torch.optim.Optimizer] = partial(
            CO2Momentum,
            lr=check_number("outer_lr", outer_lr, 0, open_low=True),
            momentum=_check_momentum("outer_momentum", outer_momentum),
            gap=check_number("gap", gap, 0, open_low=True),
            clip=None if clip is None else check_number("clip", clip, 0, open_low=True),
        )
        super().__init__(torch_optimizer, sync_every=sync_every, outer=outer, late=True, **common)


def _check_momentum(name: str, value: object) -> float:
    momentum = check_number(name, value, 0, 1)
    if momentum == 1:
        raise ValueError(f"{name} must be a number >= 0 and < 1, got {value!r}")
    return momentum
