"""Calls from many Python threads at once: the same bits as one after another, whatever else goes on meanwhile."""

import copy
import random
import sys
import threading
import time
import warnings
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from test_kernels import BUILDERS, LARGE, NAMES, SUMS_OVER_ROWS, Case, assert_close, same_bits
from test_layers import PaddedConv
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import flora
from flora import _core

THREADS = 4
LIMIT = 600  # seconds, for what would be a deadlock
CONFIGS = {
    "tucker": flora.TuckerConfig(rank=4),
    "tucker merged": flora.TuckerConfig(rank=4, plan="merged"),
    "lora": flora.LoRAConfig(rank=4),
    "toeplitz": flora.ToeplitzConfig(),
    "kronecker": flora.KroneckerConfig(target_modules=["wide", "narrow"], rank=4),
    "rescale": flora.RescaleConfig(),
}


def together(work, count=THREADS):
    """Runs work(0), work(1), … in a thread each, all of them started at once; raises what the first of them raised."""
    start, errors = threading.Barrier(count), []

    def run(i):
        try:
            start.wait(LIMIT)
            work(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
    assert not any(thread.is_alive() for thread in threads), "deadlock"
    if errors:
        raise errors[0]


@contextmanager
def switching(interval):
    """How long a thread may keep the interpreter that another one asks for."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(interval)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def cases(dtype=torch.float32):
    """One large case of each function."""
    for function, sizes in dict(reversed(LARGE)).items():
        case = Case(function, dtype)
        BUILDERS[function](case, *sizes)
        yield case


def run(case):
    return case.call(_core, lambda tensor: tensor.clone())


def test_every_function_from_many_threads_that_change_their_number_of_torch_threads(torch_threads):
    """Sums over rows depend on that number and nothing else; the other outputs on nothing."""
    every, expected = list(cases()), {}
    assert {case.function for case in every} == set(BUILDERS)
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        expected[number] = [run(case) for case in every]
    for before, after in zip(expected[1], expected[2], strict=True):
        assert all(same_bits(before[name], after[name]) for name in before if name.split("/")[0] not in SUMS_OVER_ROWS)

    def work(i):
        order = random.Random(i)
        torch.get_num_threads()  # a thread's first use takes the number that any has set last, even after its own
        for at in order.sample(range(len(every)), len(every) // 2):
            number = order.choice((1, 2, 3))
            torch.set_num_threads(number)
            found = run(every[at])
            assert all(same_bits(found[name], expected[number][at][name]) for name in found), every[at].function

    together(work)


def test_the_instruction_set_is_changed_during_calls(torch_threads):
    """A call keeps to the one that it began with: scratch is laid out for its vectors."""
    torch.set_num_threads(1)
    every = [(case, *case.expect()) for dtype in (torch.float32, torch.float16) for case in cases(dtype)]
    before, names, done = _core.info()["isa"], _core.info()["isa_available"], threading.Event()

    def change():
        while not done.is_set():
            for name in names:
                _core.set_isa(name)
                time.sleep(1e-5)

    changing = threading.Thread(target=change)
    changing.start()
    try:
        for case, exact, magnitude in every:
            for _ in range(3):
                for name, found in run(case).items():
                    assert_close(name, found, exact[name], magnitude[name], case.tolerance(found.dtype))
    finally:
        done.set()
        changing.join(LIMIT)
        _core.set_isa(before)


def test_no_function_needs_more_stack_than_a_small_thread_has():
    every = list(cases())
    before = threading.stack_size(128 << 10)  # what a thread has by default with musl
    try:
        together(lambda i: [run(case) for case in every[i::2]], count=2)
    finally:
        threading.stack_size(before)


def runs_others(call, most):
    """Whether another thread runs Python during one of up to ``most`` calls: it cannot ask for the interpreter, and so
    has it only where a call gives it up.
    """
    ticks, over = [], threading.Event()

    def tick():
        while not over.is_set():
            ticks.append(None)
            time.sleep(0)

    def ticked():
        before = len(ticks)
        call()
        return len(ticks) > before

    with switching(1000):
        other = threading.Thread(target=tick)
        other.start()
        try:
            return any(ticked() for _ in range(most))
        finally:
            over.set()
            other.join(LIMIT)


def test_other_threads_run_during_every_call(torch_threads):
    torch.set_num_threads(1)
    for case in cases():
        tensors = {name: list(view) if isinstance(view, list) else view for name, view in case.arguments.items()}
        arguments = [tensors[name] for name in NAMES[case.function]]
        assert runs_others(partial(getattr(_core, case.function), *arguments), most=2000), case.function
    assert not runs_others(partial(sorted, [0.5] * 100_000), most=50)  # which keeps it


# Models ---------------------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """A convolution, a depthwise one, one with a forward of its own, a norm, a parametrised layer, a plain one."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.padded = PaddedConv(16, 16, 2)
        self.norm = nn.LayerNorm(16)
        self.wide = weight_norm(nn.Linear(16, 64))
        self.narrow = nn.Linear(64, 16)

    def forward(self, x):
        x = self.depthwise(self.stem(x)).relu()
        x = (x + self.padded(x)).mean((2, 3))
        return x + self.narrow(self.wide(self.norm(x)).relu())


def network(config):
    torch.manual_seed(0)
    return network_of(Residual(), config)


def network_of(base, config=CONFIGS["tucker"]):
    model = flora.adapt(base, config, seed=0)
    with torch.no_grad():
        for parameter in flora.trainable_parameters(model):
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def step(model, x):
    """Output, the input's gradient and every parameter's."""
    x = x.clone().requires_grad_()
    y = model(x)
    return y.detach(), *torch.autograd.grad(y.square().sum(), [x, *flora.trainable_parameters(model)])


@pytest.mark.parametrize("method", CONFIGS)
def test_one_model_learns_and_predicts_in_many_threads(method, torch_threads):
    torch.set_num_threads(2)
    model = network(CONFIGS[method])
    xs = [torch.randn(4, 3, 10 + i, 12) for i in range(4)]
    expected = [step(model, x) for x in xs]

    def work(i):
        for _ in range(3):
            if i % 4 == 3:
                with torch.inference_mode():
                    torch.testing.assert_close(model(xs[i]), expected[i][0])
            else:
                found = step(model, xs[i])
                assert all(same_bits(*pair) for pair in zip(found, expected[i], strict=True))

    with switching(1e-5):
        together(work, len(xs))


class Waits:
    """A forward hook that stops a call on ``rows`` rows until `finish` is set."""

    def __init__(self, rows):
        self.rows, self.inside, self.finish = rows, threading.Event(), threading.Event()

    def __call__(self, module, args, output):
        if output.shape[0] == self.rows:
            self.inside.set()
            assert self.finish.wait(LIMIT)

    def __deepcopy__(self, memo):
        return self

    @contextmanager
    def during(self, call):
        """Within it another thread is inside of such a call."""
        thread = threading.Thread(target=call)
        thread.start()
        try:
            assert self.inside.wait(LIMIT)
            yield
        finally:
            self.finish.set()
            thread.join(LIMIT)


def test_no_thread_mistakes_another_ones_training_step_for_its_own():
    """Whether a step reaches every delta is not asked of it after another one has begun and forgotten what it had."""
    waits, over = Waits(rows=2), threading.Event()
    model = flora.adapt(nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4)), CONFIGS["tucker"]).train()
    model[1].register_forward_hook(waits)

    def first():
        model(torch.ones(2, 4))
        over.set()

    def begun(module, args):
        if len(args[0]) == 1:
            waits.finish.set()
            assert over.wait(LIMIT)

    model[0].register_forward_pre_hook(begun)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with waits.during(first):
            model(torch.ones(1, 4))
    assert not caught, caught[0].message


def parametrised(waits):
    layer = weight_norm(nn.Linear(4, 4))
    layer.register_forward_hook(waits)
    return network_of(nn.Sequential(nn.Linear(4, 4), layer))


def test_a_parametrised_weight_of_a_thread_without_gradients_is_not_what_another_one_trains_with():
    waits = Waits(rows=2)
    model, x = parametrised(waits), torch.randn(3, 4)
    expected = step(model, x)

    def predict():
        with torch.inference_mode():
            model(x[:2])

    with waits.during(predict):
        found = step(model, x)
    assert all(same_bits(*pair) for pair in zip(found, expected, strict=True))


def test_a_parametrised_weight_is_not_mistaken_for_that_of_a_copy():
    waits = Waits(rows=2)
    model, x = parametrised(waits), torch.randn(3, 4)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[1].base_layer.parametrizations.weight.original0.mul_(10)
    expected = other(x)
    with waits.during(lambda: model(x[:2])):
        found = other(x)
    assert same_bits(found, expected) and not torch.allclose(found, model(x))
