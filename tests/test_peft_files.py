"""LoRA adapters go to and come from Hugging Face PEFT with the same outputs; what it cannot mean is refused."""

import json
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2Model

import flora
from flora.config import LoRAConfig

pytestmark = [  # PEFT's own
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),
]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


class Net(nn.Module):
    """Every kind of layer that PEFT's LoRA serves."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 9)
        self.seq = nn.Conv1d(9, 8, 3, padding=1)
        self.image = nn.Conv2d(8, 6, (2, 3), stride=(1, 2), padding=1)
        self.volume = nn.Conv3d(6, 4, (1, 2, 2))
        self.fc = nn.Linear(4, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, ids):
        x = self.seq(self.embed(ids).mT).relu()
        x = self.image(x.unsqueeze(2).expand(-1, -1, 5, -1)).relu()
        x = self.volume(x.unsqueeze(2))
        return self.head(self.fc(x.mean((2, 3, 4))).relu())


IDS = torch.randint(20, (2, 10), generator=torch.Generator().manual_seed(0))
ALL = ["embed", "seq", "image", "volume", "fc"]


def net():
    torch.manual_seed(0)
    return Net().eval()


def gpt2():
    torch.manual_seed(0)
    return GPT2Model(GPT2Config(n_layer=2, n_embd=12, n_head=2, vocab_size=20, n_positions=16)).eval()


def output(model):
    with torch.no_grad():
        y = model(IDS)  # a tensor, or transformers' output
    return y if isinstance(y, torch.Tensor) else y.last_hidden_state


def stir(model, part, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if part in name and parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


PEFT = {
    "all kinds": (net, {"r": 3, "lora_alpha": 5, "target_modules": ALL}),
    "patterns": (
        net,
        {
            "r": 4,
            "lora_alpha": 4,
            "target_modules": ["seq", "fc"],
            "rank_pattern": {"fc": 2},
            "alpha_pattern": {"seq": 7},
            "lora_dropout": 0.1,
        },
    ),
    "stabilised": (net, {"r": 4, "lora_alpha": 4, "target_modules": ["fc"], "use_rslora": True}),
    "saved": (net, {"r": 2, "target_modules": ["fc"], "modules_to_save": ["head"]}),
    "dropout beside an embedding": (net, {"r": 2, "target_modules": ["embed", "fc"], "lora_dropout": 0.2}),
    "gpt2": (gpt2, {"r": 3, "lora_alpha": 6, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
}


def made_by_peft(case, folder):
    make, options = PEFT[case]
    model = peft.get_peft_model(make(), peft.LoraConfig(**options))
    stir(stir(model, "lora_"), "modules_to_save", 1)
    model.save_pretrained(str(folder))
    return output(model.eval())


@pytest.mark.parametrize("case", PEFT)
def test_what_peft_saved_loads_with_the_same_outputs(case, tmp_path):
    expected = made_by_peft(case, tmp_path / "adapter")
    make, options = PEFT[case]
    model = flora.load_adapter(make(), tmp_path / "adapter")
    torch.testing.assert_close(output(model.eval()), expected, **CLOSE)
    assert not torch.allclose(expected, output(make()), **CLOSE)
    rows = flora.summary(model).layers
    assert {row.method for row in rows} == {"lora", ""} if "modules_to_save" in options else {"lora"}
    assert all(p.requires_grad == (".deltas." in n or ".copies." in n) for n, p in model.named_parameters())


@pytest.mark.parametrize("case", PEFT)
def test_what_flora_saved_loads_in_peft_with_the_same_outputs(case, tmp_path):
    made_by_peft(case, tmp_path / "theirs")
    make, _ = PEFT[case]
    model = stir(flora.load_adapter(make(), tmp_path / "theirs"), ".deltas.", 2)
    flora.save_adapter(model, tmp_path / "ours", format="peft")
    again = peft.PeftModel.from_pretrained(make(), str(tmp_path / "ours"))
    torch.testing.assert_close(output(again.eval()), output(model.eval()), **CLOSE)
    once_more = flora.load_adapter(make(), tmp_path / "ours")
    torch.testing.assert_close(output(once_more.eval()), output(model), **CLOSE)


@pytest.mark.parametrize(
    "config",
    [
        LoRAConfig(rank=3, alpha=6, target_modules=ALL, modules_to_save=["head"]),
        LoRAConfig(rank=3, tucker=True, scale=0.3, target_modules=["seq", "image", "volume"]),
        flora.TuckerConfig(rank=3, scale=0.5, target_modules=ALL, rank_pattern={"fc": 2}),
        flora.LoRAXSConfig(rank=2, target_modules=["fc", "image"]),
    ],
    ids=["lora", "locon", "tucker", "lora-xs"],
)
def test_every_core_with_factors_goes_to_peft(config, tmp_path):
    model = stir(flora.adapt(net(), config), ".deltas.")
    stir(model, ".copies.", 1)
    flora.save_adapter(model, tmp_path / "adapter", format="peft")
    again = peft.PeftModel.from_pretrained(net(), str(tmp_path / "adapter"))
    torch.testing.assert_close(output(again.eval()), output(model.eval()), **CLOSE)


def test_a_pickled_file_is_read_for_its_tensors_alone(tmp_path):
    expected = made_by_peft("all kinds", tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save(tensors, tmp_path / "adapter_model.bin")
    torch.testing.assert_close(output(flora.load_adapter(net(), tmp_path).eval()), expected, **CLOSE)

    class Evil:
        def __reduce__(self):
            return print, ("run",)

    torch.save({"x": Evil()}, tmp_path / "adapter_model.bin")
    model = net()
    with pytest.raises(ValueError, match="adapter_model.bin"):
        flora.load_adapter(model, tmp_path)
    assert type(model.fc) is nn.Linear


def edited(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type='LOHA' is not the LORA"),
        ({"use_dora": True}, "use_dora=True is not plain LoRA"),
        ({"bias": "all"}, "bias='all' trains biases"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changes the base"),
        ({"r": 0}, "r=0 must be a positive int"),
        ({"lora_alpha": "x"}, "lora_alpha='x' must be a number"),
        ({"rank_pattern": {"(": 2}}, r"rank_pattern='\(' is not a regex"),
        ({"r": 4}, "lora_(embedding_)?A is .*; rank 4 needs"),
        ({"modules_to_save": ["head"]}, "head: modules_to_save=.* its tensors are missing"),
        ({"a_new_option": 3}, "a_new_option=3 is not plain LoRA"),
    ],
)
def test_what_is_not_plain_lora_is_refused_before_anything_changes(changes, message, tmp_path):
    made_by_peft("all kinds", tmp_path)
    edited(tmp_path, **changes)
    model = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        flora.load_adapter(model, tmp_path)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.update({"base_model.model.fcc.lora_A.weight": torch.ones(3, 4)}), "no module 'fcc'.*'fc'"),
        (lambda t: t.pop("base_model.model.fc.lora_B.weight"), "fc: lora_B is missing"),
        (lambda t: t.update({"base_model.model.fc.weight": torch.ones(12, 4)}), "'fc.weight' is neither of LoRA nor"),
        (lambda t: t.clear(), "there is no tensor"),
        (lambda t: t["base_model.model.fc.lora_B.weight"].fill_(torch.nan), "fc: .*not finite"),
    ],
)
def test_wrong_tensors_are_refused(edit, message, tmp_path):
    made_by_peft("all kinds", tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    model = net()
    with pytest.raises(ValueError, match=message):
        flora.load_adapter(model, tmp_path)
    assert type(model.fc) is nn.Linear


def test_what_peft_cannot_hold_is_not_written(tmp_path):
    model = stir(flora.adapt(net(), flora.CirculantConfig(target_modules=["fc"])), ".deltas.")
    with pytest.raises(ValueError, match="fc: PEFT's format holds LoRA, and no delta of method 'circulant'"):
        flora.save_adapter(model, tmp_path / "x", format="peft")
    grouped = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    flora.adapt(grouped, LoRAConfig(rank=2))
    with pytest.raises(ValueError, match="0: groups=2 of the convolution: PEFT's LoRA connects the groups"):
        flora.save_adapter(grouped, tmp_path / "x", format="peft")
    with pytest.raises(ValueError, match="format='bin' must be one of flora, peft"):
        flora.save_adapter(model, tmp_path / "x", format="bin")
    assert not (tmp_path / "x").exists()


def test_a_folder_is_replaced_by_one_of_its_own_format(tmp_path):
    model = flora.adapt(net(), LoRAConfig(rank=2, target_modules=["fc"]))
    flora.save_adapter(model, tmp_path / "x", format="peft")
    stir(model, ".deltas.")
    flora.save_adapter(model, tmp_path / "x", format="peft")
    torch.testing.assert_close(output(flora.load_adapter(net(), tmp_path / "x")), output(model.eval()), **CLOSE)
    with pytest.raises(FileExistsError):
        flora.save_adapter(model, tmp_path / "x")


@pytest.mark.parametrize("name", ["fc", "seq", "image", "volume"])
def test_forward_and_gradients_are_those_of_pefts_lora(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(net(), peft.LoraConfig(r=3, lora_alpha=6, target_modules=[name]))
    stir(theirs, "lora_")
    ours = flora.adapt(net(), LoRAConfig(rank=3, alpha=6, target_modules=[name]))
    layer = getattr(theirs.base_model.model, name)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    delta = getattr(ours, name).deltas["default"]
    own = {"core": a, "factors.0": b.flatten(1)} if a.ndim > 2 else {"factors.0": b, "factors.1": a.mT}
    delta.load_tensors({key: value.detach() for key, value in own.items()})
    theirs(IDS).square().sum().backward()
    ours(IDS).square().sum().backward()
    torch.testing.assert_close(output(ours), output(theirs), **CLOSE)
    named = dict(delta.named_parameters())
    pairs = (
        {"core": a.grad, "factors.0": b.grad.flatten(1)}
        if a.ndim > 2
        else {"factors.0": b.grad, "factors.1": a.grad.mT}
    )
    for key, gradient in pairs.items():
        torch.testing.assert_close(named[key].grad, gradient, rtol=1e-4, atol=1e-4)
