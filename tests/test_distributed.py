"""Adapters under DistributedDataParallel: two processes with gloo compute what one does on the whole batch."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch.distributed

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this PyTorch has no gloo")

SCRIPT = textwrap.dedent("""
    import os, sys, torch, flora
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    rank, store = int(sys.argv[1]), sys.argv[2]

    def adapted(choose):
        torch.manual_seed(0)
        head = nn.Linear(6, 5), nn.Linear(5, 2)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 6), *head)
        flora.adapt(model, flora.TuckerConfig(rank=2, exclude_modules=["5"]), "a")
        flora.adapt(model, flora.CirculantConfig(exclude_modules=["5"]), "b")
        flora.adapt(model, flora.RescaleConfig(target_modules=["3"], modules_to_save=["5"]), "c")
        choose(model)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn(parameter.shape))
        return model

    generator = torch.Generator().manual_seed(1)
    images, labels = torch.randn(4, 3, 8, 8, generator=generator), torch.tensor([0, 1, 1, 0])

    def step(model, x, y):
        nn.functional.cross_entropy(model(x), y).backward()

    CHOICES = {
        "one": lambda model: flora.set_adapter(model, "b"),
        "weighted": lambda model: flora.set_adapter(model, {"a": 0.7, "c": -0.3}),
        "one of two": lambda model: flora.set_adapter(model, ["a", "b"], trainable=["b"]),
        "whole module": lambda model: flora.set_adapter(model, "c"),
    }
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for case, choose in CHOICES.items():
        whole = adapted(choose)
        step(whole, images, labels)
        expected = {name: p.grad for name, p in whole.named_parameters() if p.requires_grad}
        assert expected and all(g is not None for g in expected.values()), case

        model = adapted(choose)
        parallel = DistributedDataParallel(model)
        for _ in range(2):  # the second shows that the first one's reduction came to its end
            parallel.zero_grad()
            step(parallel, images[rank::2], labels[rank::2])
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad == (name in expected), (case, name)
            if name in expected:
                torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)
    torch.distributed.destroy_process_group()
    os._exit(0)  # past the threads of PyTorch's that may still be at work when an interpreter ends
""")


def test_gradients_are_those_of_one_process_on_the_whole_batch(tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], stderr=subprocess.PIPE, env=environment)
        for rank in range(2)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=600)
            assert process.returncode == 0, errors.decode()
    finally:
        for process in processes:
            process.kill()
            process.communicate()
