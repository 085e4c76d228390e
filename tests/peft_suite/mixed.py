"""PEFT's checks of mixed models, with FLoRA as one of the two methods on the same or on different layers."""

import pytest
import torch
from peft import AdaLoraConfig, LoHaConfig, LoKrConfig, LoraConfig
from peft_tests.test_mixed import SimpleNet, TestMixedAdapterTypes

from flora.integrations.peft import FloraConfig

OTHERS = (
    LoraConfig(init_lora_weights=False),
    LoHaConfig(init_weights=False),
    LoKrConfig(init_weights=False),
    AdaLoraConfig(init_lora_weights=False, total_step=1),
)
PAIRS = [
    pair
    for other in OTHERS
    for pair in ((FloraConfig(init_weights=False), other), (other, FloraConfig(init_weights=False)))
]
checks = TestMixedAdapterTypes()
del TestMixedAdapterTypes  # its own tests are not collected here


@pytest.mark.parametrize(
    ("config0", "config1"), [*PAIRS, (FloraConfig(init_weights=False), FloraConfig(init_weights=False))]
)
@pytest.mark.parametrize(("first", "second"), [("lin0", "lin0"), ("lin1", "lin1"), ("lin0", "lin1"), ("lin1", "lin0")])
def test_mixed(config0, config1, first, second):
    config0.target_modules, config1.target_modules = [first], [second]
    x = torch.arange(90).reshape(9, 10)
    last = first == second == "lin1"
    checks._check_mixed_outputs(SimpleNet, config0, config1, x, is_commutative=last)
    checks._check_merging(SimpleNet, config0, config1, x)
    checks._check_unload(SimpleNet, config0, config1, x)
    checks._check_disable(SimpleNet, config1, config0, x)
    checks._check_loading(SimpleNet, config0, config1, x, is_commutative=last)
