"""What happens to whole processes: fork, workers, the interpreter's end, signals, other libraries with threads.

Each script runs in an interpreter of its own, with a time limit, since what it would otherwise do is hang.
"""

import hashlib
import itertools
import os
import pickle
import subprocess
import sys
import warnings
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch
from test_kernels import NAMES, same_bits
from test_threads import cases, network_of, run, step
from torch import Tensor, nn

import flora
from flora import _core

HERE = Path(__file__).parent
PACKAGE = str(Path(flora.__file__).parent)
LIMIT = 300  # seconds
SLOW = pytest.mark.slow

PRELUDE = """
import atexit, os, random, signal, sys, threading, time, traceback
import torch
import flora
from flora import _core
from test_threads import CONFIGS, cases, network, run, same_bits, step, switching, together
"""


def python(code, *arguments, **environment):
    """What the script prints. Nothing may be said on stderr."""
    paths = os.pathsep.join([str(HERE.parent), str(HERE)])
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": paths} | environment,
        timeout=LIMIT,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


# Fork ---------------------------------------------------------------------------------------------------------------

FORK = """
import warnings
warnings.filterwarnings("ignore", ".*use of fork", DeprecationWarning)  # Python's own, of a fork with threads
forks = int(sys.argv[1])
every = list(cases())
torch.set_num_threads(1)
serial = [{name: tensor.numpy().tobytes() for name, tensor in run(case).items()} for case in every]
torch.set_num_threads(2)
for case in every:
    run(case)  # on the pool, whose threads no child has
over = threading.Event()

def work(seed):
    order = random.Random(seed)
    while not over.is_set():
        run(order.choice(every))

def check():
    assert _core.info()["pool"] == "serial"
    for case, expected in zip(every, serial, strict=True):
        found = case.call(_core, lambda tensor: tensor)  # PyTorch's own operations would wait for its pool
        assert all(tensor.numpy().tobytes() == expected[name] for name, tensor in found.items()), case.function

def child():
    grandchild = os.fork()
    check()
    if grandchild != 0:
        assert os.waitstatus_to_exitcode(os.wait()[1]) == 0
    os._exit(0)

threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
for thread in threads:
    thread.start()
try:
    for _ in range(forks):
        pid = os.fork()
        if pid == 0:
            try:
                child()
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
finally:
    over.set()
assert _core.info()["pool"] == "torch"
"""


@pytest.mark.parametrize("forks", [2, pytest.param(50, marks=SLOW)])
def test_a_fork_of_a_process_whose_threads_are_in_calls(forks):
    """A child computes by itself what one thread computes; so does its own child."""
    python(PRELUDE + FORK, forks)


class Adapted(torch.utils.data.Dataset):
    """Samples that went through an adapted model in a worker, with a backward there."""

    def __init__(self):
        layers = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.Linear(128, 5)
        self.model = network_of(nn.Sequential(*layers))

    def __len__(self):
        return 4

    def __getitem__(self, i):
        return step(self.model, torch.full((1, 3, 6, 6), 0.1 * i))


@pytest.mark.parametrize("method", ["fork", "spawn", pytest.param("forkserver", marks=SLOW)])
def test_workers_of_a_data_loader(method):
    data = Adapted()
    expected = torch.utils.data.default_collate([data[i] for i in range(4)])  # threads have run in the parent
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python's own, of a fork with threads
        loader = torch.utils.data.DataLoader(
            data, batch_size=4, num_workers=1, multiprocessing_context=method, timeout=LIMIT
        )
        (found,) = list(loader)
    torch.testing.assert_close(found, expected)


# The end ------------------------------------------------------------------------------------------------------------

AT_THE_END = """
import builtins, numpy, weakref
x = torch.randn(2, 3, 8, 8)
model = network(CONFIGS["tucker"])
y = model(x.requires_grad_())  # with its graph
layers, local = list(model.children()), threading.local()
local.model = model
builtins.model = model
case = next(cases())

def use(who):
    assert len(step(model, torch.ones(1, 3, 8, 8))) > 1 and run(case)
    os.write(1, who)

class Last:
    __slots__ = ()  # so that the collector of cycles does not see it, and it goes after what does
    def __del__(self, call=_core.tucker_reconstruct, out=numpy.zeros(64), ones=numpy.ones(64), write=os.write):
        call(out, None, ones, [None], 2.0)
        write(1, b"del ")

last = Last()
builtins.last = Last()
weakref.finalize(model, use, b"finalize ")
atexit.register(use, b"atexit ")

def late():
    threading.main_thread().join()
    use(b"thread ")

threading.Thread(target=late).start()
"""


def test_live_objects_at_the_end_of_the_interpreter():
    told = python(PRELUDE + AT_THE_END).split()
    assert told[0] == "thread"  # not a daemon's: it is waited for
    assert sorted(told[1:3]) == ["atexit", "finalize"]
    assert told[3:] == ["del", "del"]


DAEMONS = """
from test_kernels import NAMES
torch.set_num_threads(2)
busy = [threading.Event() for _ in range(3)]

def plain(value):
    # a call asks a tensor whether it is lazily negated, and PyTorch aborts a process whose end comes upon its answer
    if isinstance(value, torch.Tensor):
        return value.numpy()
    return [plain(item) for item in value] if isinstance(value, list) else value

def given(case):
    return getattr(_core, case.function), [plain(case.arguments[name]) for name in NAMES[case.function]]

every = [given(case) for case in cases()]

def work(i):
    order = random.Random(i)
    while True:
        call, arguments = order.choice(every)
        call(*arguments)
        busy[i].set()

for i in range(3):
    threading.Thread(target=work, args=(i,), daemon=True).start()
for event in busy:
    event.wait()
time.sleep(random.random() * 0.01)
"""


@pytest.mark.parametrize("ends", [1, pytest.param(20, marks=SLOW)])
def test_daemon_threads_in_calls_at_the_end_of_the_interpreter(ends):
    for _ in range(ends):
        python(PRELUDE + DAEMONS)


# Signals ------------------------------------------------------------------------------------------------------------

INTERRUPTED = """
torch.set_num_threads(1)
long = torch.zeros(16384, 1024), None, torch.ones(16384, 1024), *(torch.ones(1024, 32) for _ in range(3))
model = flora.adapt(torch.nn.Sequential(*(torch.nn.Linear(512, 512) for _ in range(6))), flora.TuckerConfig(rank=8))
with torch.no_grad():
    for parameter in flora.trainable_parameters(model):
        parameter.add_(0.1)
x = torch.randn(64, 512)
base = [layer.base_layer.weight.clone() for layer in model]
before = step(model, x)
go = threading.Lock()

def interrupt():
    while True:
        go.acquire()  # a lock, which a release gives away at once
        os.kill(os.getpid(), signal.SIGINT)

def interrupted(call, most=500):
    '''Has one Ctrl-C come while a call is away in C; gives where it was raised.'''
    for _ in range(most):
        returned = False
        try:
            go.release()  # the other thread goes on as soon as this one gives up the interpreter
            call()
            returned = True
            while True:
                time.sleep(1)
        except KeyboardInterrupt as error:
            if returned:  # the call was over before the other thread had got anywhere
                undo()
                continue
            return [frame.name for frame in traceback.extract_tb(error.__traceback__)]
    raise AssertionError("never during the call")

def undo():
    if any(layer.merged for layer in model):
        flora.unmerge(model)

def kernel():
    y, h, x, u_in, _, u_out = long
    _core.tucker_linear_forward(y, h, x, u_in, None, u_out, 1.0)

def check():
    assert not any(layer.merged for layer in model)
    assert all(torch.equal(layer.base_layer.weight, weight) for layer, weight in zip(model, base))
    assert all(same_bits(*pair) for pair in zip(step(model, x), before))

go.acquire()
threading.Thread(target=interrupt, daemon=True).start()
with switching(1000):
    for _ in range(5):
        version = long[0]._version
        assert "kernel" in interrupted(kernel)
        assert long[0]._version > version
    assert long[0].min() == long[0].max() > 0  # written as a whole
    for call in (lambda: step(model, x), lambda: flora.merge(model)):
        interrupted(call)
        check()
"""


def test_a_keyboard_interrupt_during_a_call_is_raised_when_it_returns():
    """What it has written counts as written. In the middle of a merge, which is undone."""
    python(PRELUDE + INTERRUPTED)


def disabling(model):
    with flora.disabled(model):
        model(torch.ones(1, 3, 4, 4))


VERBS = {
    "adapt": lambda model: flora.adapt(model, flora.LoRAConfig(rank=2), "new", base_dtype=model.base_dtype),
    "set_adapter": lambda model: flora.set_adapter(model, {"one": 0.5, "two": 2.0}),
    "delete_adapter": lambda model: flora.delete_adapter(model, "one"),
    "merge": flora.merge,
    "unmerge": flora.unmerge,
    "disabled": disabling,
    "unload": partial(flora.unload, merge=False),
}


def interrupt_at(number):
    """A tracer that acts as Ctrl-C would at one of the lines of flora that are run, and what counts them."""
    lines = itertools.count()

    def trace(frame, event, argument):
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line" and next(lines) == number:
            raise KeyboardInterrupt
        return trace

    return trace


@pytest.mark.parametrize("step", [29, pytest.param(3, marks=SLOW)])
@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_that_is_interrupted_leaves_the_base_whole(verb, half, step):
    """At any of its lines: what there is of adapters can be taken off, and the base's numbers are what they were."""
    for number in itertools.count(0, step):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3)).eval()
        model.base_dtype = torch.bfloat16 if half else None
        before = {key: value.clone() for key, value in model.state_dict().items()}
        if verb != "adapt":
            flora.adapt(model, flora.TuckerConfig(rank=2), "one", base_dtype=model.base_dtype)
            flora.add_adapter(model, flora.RescaleConfig(init="reference"), "two")
            flora.set_adapter(model, ["one", "two"])
        if verb == "unmerge":
            flora.merge(model)
        tracer = sys.gettrace()
        try:
            sys.settrace(interrupt_at(number))
            VERBS[verb](model)
            over = True
        except KeyboardInterrupt:
            over = False
        finally:
            sys.settrace(tracer)
        with suppress(RuntimeError):  # there are no adapters any more, or not yet
            flora.unload(model, merge=False)
        assert not any(isinstance(module, flora.AdaptedLayer) for module in model.modules())
        for key, value in model.state_dict().items():
            assert torch.equal(value, before[key].to(value.dtype)), (number, key)
        if over:
            break
    assert number > 5


# Other libraries ----------------------------------------------------------------------------------------------------

LIBRARIES = ("numpy", "torch", "sklearn.cluster", "flora")
USUAL = ("sklearn.cluster", "torch", "numpy", "flora")
ORDERS = [
    pytest.param(order, marks=[] if order == USUAL else SLOW, id="-".join(order))
    for order in itertools.permutations(LIBRARIES)
]


def digest():
    """Of everything that the functions write."""
    written = (found for case in cases() for found in run(case).values())
    return hashlib.sha256(b"".join(found.numpy().tobytes() for found in written)).hexdigest()


BESIDE = (
    """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
"""
    + PRELUDE
    + """
import numpy, threadpoolctl, sklearn.cluster
from test_processes import digest
torch.set_num_threads(2)
data = numpy.random.default_rng(0).normal(size=(3000, 8)).astype(numpy.float32)

def cluster():
    return sklearn.cluster.KMeans(4, n_init=1, max_iter=10, random_state=0).fit(data).inertia_

alone, clustered = digest(), cluster()
runtimes = {entry["filepath"] for entry in threadpoolctl.threadpool_info() if entry["user_api"] == "openmp"}
assert len(runtimes) == 2, runtimes

def work(i):
    if i:
        assert abs(cluster() - clustered) <= 1e-5 * clustered
    else:
        torch.set_num_threads(2)
        assert digest() == alone

together(work, 2)
print(_core.info()["pool"], alone)
"""
)


@pytest.mark.parametrize("order", ORDERS)
def test_beside_another_openmp_runtime_imported_in_any_order(order, torch_threads):
    torch.set_num_threads(2)
    assert python(BESIDE, *order).split() == ["torch", digest()]


WITHOUT_TORCH = """
import ctypes, importlib.util, pickle, sys
import numpy as np
extension, pool, openmp, given, written = sys.argv[1:]
if openmp:
    ctypes.CDLL(openmp, ctypes.RTLD_GLOBAL)
spec = importlib.util.spec_from_file_location("flora._core", extension)
core = importlib.util.module_from_spec(spec)
spec.loader.exec_module(core)
info = core.info()
assert (info["pool"], "torch" in sys.modules) == (pool, False), info
with open(given, "rb") as file:
    calls = pickle.load(file)
for function, arguments in calls:
    getattr(core, function)(*arguments)
with open(written, "wb") as file:
    pickle.dump(calls, file)
"""


@pytest.mark.parametrize(("pool", "number"), [("serial", 1), ("gomp", 1), ("gomp", 2)])
def test_without_the_thread_functions_of_torch(pool, number, tmp_path, torch_threads):
    """Then OpenMP's, then none: a call writes the same bits as on as many threads of PyTorch's."""
    openmp = next(Path(torch.__file__).parent.glob("lib/libgomp*"), None)
    if pool == "gomp" and openmp is None:
        pytest.skip("this build of PyTorch has no GNU OpenMP")

    def plain(value):
        if isinstance(value, Tensor):
            return value.numpy()
        return [plain(item) for item in value] if isinstance(value, list) else value

    torch.set_num_threads(number)
    calls, expected = [], []
    for case in cases():
        tensors = {name: plain(value) for name, value in case.arguments.items()}
        calls.append((case.function, [tensors[name] for name in NAMES[case.function]]))
        expected.append(run(case))
    given, written = tmp_path / "given", tmp_path / "written"
    given.write_bytes(pickle.dumps(calls))
    used = openmp if pool == "gomp" else ""
    python(WITHOUT_TORCH, _core.__file__, pool, used, given, written, OMP_NUM_THREADS=str(number))
    for (function, arguments), wanted in zip(pickle.loads(written.read_bytes()), expected, strict=True):
        for key, tensor in wanted.items():
            name, _, index = key.partition("/")
            found = arguments[NAMES[function].index(name)]
            found = torch.from_numpy(found[int(index)] if index else found)
            assert same_bits(found, tensor), f"{function}: {key}"
