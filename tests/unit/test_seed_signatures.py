"""Names, order and defaults of the arguments that users of Hetu, SINGA and torch_npu know."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

import heatopt
from heatopt.compat import hetu, npu, singa

_RATE = "init_lr, max_lr, min_lr, lr_warmup_steps, lr_decay_steps, lr_decay_style"
_DECAY = "start_wd=0.0, end_wd=0.0, wd_incr_steps=-1, wd_incr_style='constant'"
_MINIMIZE = "loss, var_list=None, grad_loss=None, name=''"

SIGNATURES: dict[Callable[..., Any], str] = {
    hetu.AdamOptimizer: f"{_RATE}, {_DECAY}, beta1=0.9, beta2=0.999, eps=1e-08",
    hetu.SGDOptimizer: f"{_RATE}, momentum=0.0, nesterov=False",
    hetu.AdamOptimizer.minimize: _MINIMIZE,
    hetu.AdamOptimizer.get_states: "var",
    hetu.AdamOptimizer.set_states: "var, state_name, value",
    hetu.GradScaler: "init_scale=65536.0, growth_factor=2.0, backoff_factor=0.5, growth_interval=2000, enabled=True",
    hetu.GradScaler.scale: "outputs",
    hetu.GradScaler.minimize: f"op, {_MINIMIZE}",
    hetu.GradScaler.update: "new_scale=None",
    heatopt.DataParallelOptimizer.minimize: _MINIMIZE,
    singa.SGD: "lr=0.1, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False",
    singa.RMSProp: "lr=0.1, rho=0.9, epsilon=1e-08, weight_decay=0.0",
    singa.AdaGrad: "lr=0.1, epsilon=1e-08, weight_decay=0.0",
    singa.Adam: "lr=0.1, beta_1=0.9, beta_2=0.999, epsilon=1e-08, weight_decay=0.0",
    singa.ExponentialDecay: "init_value, decay_steps, decay_rate, staircase=False",
    singa.Model.set_optimizer: "optimizer",
    singa.DistOpt.backward_and_update_half: "loss, threshold=None, clipping=False, clip_Value=100.0",
    singa.DistOpt.backward_and_partial_update: "loss, threshold=2097152",
    singa.DistOpt.backward_and_sparse_update: "loss, threshold=None, spars=0.05, topK=False, corr=True",
    npu.NpuFusedAdam: "params, lr=0.001, betas=(0.9, 0.999), eps=1e-08, weight_decay=0.0, amsgrad=False",
}


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda function: f"{function.__module__}.{function.__qualname__}")
def test_arguments_by_position(function: Callable[..., Any]) -> None:
    parameters = inspect.signature(function).parameters.values()
    given = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "self"]
    found = [p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in given]
    assert ", ".join(found) == SIGNATURES[function]
