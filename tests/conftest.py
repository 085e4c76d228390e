"""What the tests share: instruction sets × thread counts × dtypes as fixtures, and the one table of tolerances."""

import os

import hypothesis
import pytest
import torch

from flora import _core

hypothesis.settings.register_profile(
    "dev",
    max_examples=int(os.environ.get("FLORA_TEST_EXAMPLES", "15")),
    deadline=None,  # the first example of a test pays for imports and caches
    database=None,
    derandomize="FLORA_TEST_EXAMPLES" not in os.environ,  # given, the examples are new in every run
    print_blob=True,
)
hypothesis.settings.load_profile("dev")

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

TOLERANCE = {
    torch.float64: 1e-14,
    torch.float32: 4e-6,
    torch.bfloat16: 2**-8 + 4e-6,
    torch.float16: 2**-11 + 4e-6,
}
"""The error that one element of a result may have, by the dtype it is written in, relative to the sum of the magnitudes
of all terms that it is made of. For the 16-bit types: one rounding of a float32 sum."""

NATIVE_BFLOAT16 = ("soft-tiles", "v4-bf16", "v4-amx")
"""The instruction sets that multiply bfloat16 themselves: whatever meets bfloat16 activations is rounded to it once."""


@pytest.fixture(params=_core.info()["isa_available"], scope="module")
def isa(request):
    """Every instruction set that this CPU and build have, one after the other."""
    before = _core.info()["isa"]
    _core.set_isa(request.param)
    yield request.param
    _core.set_isa(before)


@pytest.fixture(params=[1, 2], ids=["1-thread", "2-threads"], scope="module")
def threads(request):
    """One and two threads of PyTorch's pool."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def torch_threads():
    """For a test that changes their number."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."), scope="module")
def dtype(request):
    """The dtype of activations; factors and gradients are of `compute_dtype(dtype)`."""
    return request.param
