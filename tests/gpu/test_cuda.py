"""CUDA tensors: NCCL where each rank has a GPU, host staging otherwise. Runs where a GPU is at hand."""

from __future__ import annotations

import pytest
import torch

import heatopt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def device_of(comm):
    return torch.device("cuda", comm.node_rank % torch.cuda.device_count())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.complex64])
def test_allreduce_sums_device_tensors_exactly(ranks, dtype):
    def body(comm):
        values = (torch.arange(100_003) % 7 + comm.rank).to(dtype)
        expected = sum(((torch.arange(100_003) % 7 + rank).to(dtype).to(torch.complex128)) for rank in range(comm.size))
        result = comm.allreduce(values.to(device_of(comm)))
        assert result.device.type == "cuda"
        assert torch.equal(result.cpu(), (expected if dtype.is_complex else expected.real).to(dtype))

    ranks(body)


@pytest.mark.parametrize("blocking", [True, False, None])
def test_training_on_devices_equals_one_process(ranks, blocking):
    inputs = torch.linspace(-1, 1, 12 * 5, dtype=torch.float64).view(12, 5)

    def model(device):
        network = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3)).double()
        with torch.no_grad():
            for number, parameter in enumerate(network.parameters()):
                parameter.copy_(torch.linspace(-0.5, 0.5 + number, parameter.numel()).view_as(parameter))
        return network.to(device)

    def train(network, optimizer, batch):
        for _ in range(3):
            optimizer.zero_grad()
            network(batch).square().mean().backward()
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in network.parameters()])

    def body(comm):
        device = device_of(comm)
        reference = model(device)
        expected = train(reference, torch.optim.AdamW(reference.parameters(), lr=0.01), inputs.to(device))
        network = model(device)
        optimizer = heatopt.DataParallelOptimizer(
            torch.optim.AdamW(network.parameters(), lr=0.01), blocking, comm=comm, bucket_mb=1e-4
        )
        share = inputs.shape[0] // comm.size
        found = train(network, optimizer, inputs[comm.rank * share : (comm.rank + 1) * share].to(device))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        assert all(torch.equal(found, other) for other in comm.all_gather(found))

    ranks(body)
