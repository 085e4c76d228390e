"""flora under Hugging Face Trainer: checkpoints, resuming, the best model, and the model card beside an adapter."""

import json
import re
import subprocess
import sys

import peft
import pytest
import torch
import yaml
from torch import nn
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

import flora
from flora.integrations.peft import FloraConfig
from flora.integrations.transformers import AdapterCheckpoints, AdapterTrainer, restore_adapter, write_model_card

CONFIG = flora.TuckerConfig(rank=4, dropout=0.1, modules_to_save=["classifier"])
BERT = BertConfig(
    vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, num_labels=3
)
VIT = ViTConfig(
    hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, image_size=16, patch_size=8
)
GPT2 = GPT2Config(vocab_size=40, n_embd=32, n_layer=1, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0)
MIXTRAL = MixtralConfig(
    vocab_size=40,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    num_local_experts=2,
)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Networks so small spend their time on waiting for threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Examples(Dataset):
    """Sentences whose class is that of their first word, for a classifier or a language model, or images."""

    def __init__(self, number=48, task="classify"):
        generator = torch.Generator().manual_seed(number)
        self.ids = torch.randint(3, 40, (number, 8), generator=generator)
        self.images = torch.randn(number, 3, 16, 16, generator=generator)
        self.task = task

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        if self.task == "image":
            return {"pixel_values": self.images[index], "labels": int(self.images[index].mean() > 0)}
        labels = self.ids[index, 0] % 3 if self.task == "classify" else self.ids[index]
        return {"input_ids": self.ids[index], "labels": labels}


def bert_base():
    torch.manual_seed(0)
    return BertForSequenceClassification(BERT)


def bert(config=CONFIG):
    return flora.adapt(bert_base(), config)


def trainer(model, folder, kind=AdapterTrainer, task="classify", **settings):
    settings = {"max_steps": 6, "save_steps": 3, "eval_steps": 3, "learning_rate": 1e-2, **settings}
    arguments = TrainingArguments(
        str(folder),
        eval_strategy="steps",
        per_device_train_batch_size=8,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=3,
        **settings,
    )
    return kind(model, arguments, train_dataset=Examples(task=task), eval_dataset=Examples(16, task))


def equal(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def adapter(model):
    return {key: value.clone() for key, value in model.state_dict().items() if ".deltas." in key or ".copies." in key}


MODELS = {
    "bert": (lambda: BertForSequenceClassification(BERT), CONFIG, "classify"),
    "names on disk are others": (lambda: ViTForImageClassification(VIT), CONFIG, "image"),
    "experts": (
        lambda: MixtralForCausalLM(MIXTRAL),
        flora.TuckerConfig(rank=4, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"]),
        "generate",
    ),
    "tied and adapted": (
        lambda: GPT2LMHeadModel(GPT2),
        flora.TuckerConfig(rank=4, target_modules=["c_attn", "lm_head"]),
        "generate",
    ),
    "mixed methods": (
        lambda: BertForMaskedLM(BERT),
        {"query": flora.LoRAConfig(rank=4), "all": flora.KroneckerConfig(rank=4, dropout=0.2)},
        "generate",
    ),
}


@pytest.mark.parametrize("which", MODELS)
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(which, tmp_path):
    build, config, task = MODELS[which]

    def fresh():
        torch.manual_seed(0)
        return flora.adapt(build(), config)

    whole, resumed = fresh(), fresh()
    trainer(whole, tmp_path / "a", task=task).train()
    again = trainer(resumed, tmp_path / "b", task=task)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert equal(whole, resumed)
    for name in ("adapter_model.safetensors", "optimizer.pt"):
        files = [next((tmp_path / run / "checkpoint-6").rglob(name)) for run in "ab"]
        assert files[0].read_bytes() == files[1].read_bytes(), name


def test_a_plain_trainer_resumes_exactly_too(tmp_path):
    whole, resumed = bert(), bert()
    trainer(whole, tmp_path / "a", Trainer).train()
    trainer(resumed, tmp_path / "b", Trainer).train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert equal(whole, resumed)


def test_a_checkpoint_of_a_plain_trainer_is_taken_up(tmp_path):
    whole, resumed = bert(), bert()
    trainer(whole, tmp_path / "a", Trainer).train()
    trainer(resumed, tmp_path / "b").train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert equal(whole, resumed)


def test_a_checkpoint_holds_the_adapter_alone_and_loads(tmp_path):
    model = bert()
    trainer(model, tmp_path).train()
    folder = tmp_path / "checkpoint-6"
    assert not list(folder.rglob("model.safetensors")) and not list(folder.rglob("config.json"))
    assert sorted(path.name for path in (folder / "default").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    again = flora.load_adapter(bert_base(), folder, trainable=False)
    ids = Examples().ids
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model.eval()(ids).logits)


def test_the_best_model_comes_back(tmp_path):
    """The best is said to be the greatest loss, so that it is not the last step's."""
    model = bert()
    runs = trainer(
        model, tmp_path, max_steps=9, load_best_model_at_end=True, greater_is_better=True, save_total_limit=1
    )
    runs.train()
    losses = {log["step"]: log["eval_loss"] for log in runs.state.log_history if "eval_loss" in log}
    best = max(losses, key=losses.get)
    assert best != 9 and runs.state.best_global_step == best
    assert runs.evaluate()["eval_loss"] == pytest.approx(losses[best], rel=1e-6)
    runs.save_model(str(tmp_path / "best"))
    again = flora.load_adapter(bert_base(), tmp_path / "best")
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in adapter(again).items())
    assert f"| eval_loss | {losses[best]:.4g} |" in (tmp_path / "best" / "default" / "README.md").read_text()


def test_several_adapters_are_in_a_checkpoint(tmp_path):
    def fresh():
        model = flora.add_adapter(bert(), flora.LoRAConfig(rank=2), name="second")
        flora.set_adapter(model, ["default", "second"])
        return model

    whole, resumed = fresh(), fresh()
    trainer(whole, tmp_path / "a").train()
    trainer(resumed, tmp_path / "b").train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert equal(whole, resumed)
    with torch.no_grad():
        assert all(core.abs().max() > 0 for name, core in adapter(whole).items() if name.endswith(".core"))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # what PEFT asks a model
def test_a_plain_trainer_knows_a_model_of_peft(tmp_path):
    def fresh():
        config = FloraConfig(r=4, dropout=0.1, target_modules=["query", "dense"], modules_to_save=["classifier"])
        return peft.get_peft_model(bert_base(), config)

    torch.manual_seed(0)
    whole = fresh()
    torch.manual_seed(1)  # what is loaded is not what is drawn
    resumed = fresh()
    trainer(whole, tmp_path / "a", Trainer).train()
    trainer(resumed, tmp_path / "b", Trainer).train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert equal(whole, resumed)
    assert not list(tmp_path.rglob("model.safetensors"))


class Counting(Trainer):
    """Stands for a trainer of another library."""

    batches = 0

    def training_step(self, *args, **kwargs):
        self.batches += 1
        return super().training_step(*args, **kwargs)


def test_the_mixin_goes_before_other_trainers(tmp_path):
    class CountingAdapterTrainer(AdapterCheckpoints, Counting):
        pass

    runs = trainer(bert(), tmp_path, CountingAdapterTrainer)
    runs.train()
    assert runs.batches == 6
    assert (tmp_path / "checkpoint-3" / "default" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    "settings",
    [
        {"activation_checkpointing": True},
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
        {"bf16": True},
        {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1},
    ],
    ids=["checkpointing", "reentrant checkpointing", "bf16", "accumulation"],
)
def test_settings_of_the_trainer(settings, tmp_path):
    model = bert(flora.TuckerConfig(rank=4, modules_to_save=["classifier"]))
    if settings.get("activation_checkpointing_kwargs"):
        model.enable_input_require_grads()
    before, base = adapter(model), {k: v.clone() for k, v in model.state_dict().items() if k not in adapter(model)}
    runs = trainer(model, tmp_path, **settings)
    runs.train()
    moved = {key for key, value in adapter(model).items() if not torch.equal(value, before[key])}
    assert moved == set(before)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in base.items())
    assert runs.predict(Examples(16)).predictions.shape == (16, 3)


def test_it_learns(tmp_path):
    model = bert()
    first = trainer(model, tmp_path).evaluate()["eval_loss"]
    trainer(model, tmp_path, max_steps=80, save_steps=80, eval_steps=80).train()
    assert trainer(model, tmp_path).evaluate()["eval_loss"] < 0.85 * first


def test_activation_checkpointing_changes_no_gradient():
    ids = Examples().ids
    gradients = []
    for checkpointing in (False, True):
        model = bert(flora.TuckerConfig(rank=4, modules_to_save=["classifier"]))
        if checkpointing:
            model.activation_checkpointing_enable()
        torch.manual_seed(1)
        model.train()(ids, labels=ids[:, 0] % 3).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


# Restoring ---------------------------------------------------------------------------------------------------------


def test_restoring_keeps_the_parameters(tmp_path):
    model = bert()
    flora.save_adapter(model, tmp_path / "start")
    parameters, start = list(model.parameters()), adapter(model)
    with torch.no_grad():
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.add_(1.0)
    restore_adapter(model, tmp_path / "start")
    assert all(one is other for one, other in zip(parameters, model.parameters(), strict=True))
    assert all(torch.equal(value, start[key]) for key, value in adapter(model).items())


def test_what_does_not_fit_is_not_restored(tmp_path):
    flora.save_adapter(bert(flora.TuckerConfig(rank=4)), tmp_path / "other modules")
    flora.save_adapter(bert(flora.TuckerConfig(rank=3, modules_to_save=["classifier"])), tmp_path / "other rank")
    model = bert()
    before = adapter(model)
    for folder, message in (("other modules", "on other modules: classifier"), ("other rank", "the model needs")):
        with pytest.raises(ValueError, match=f"{folder}.*{message}"):
            restore_adapter(model, tmp_path / folder)
    flora.save_adapter(bert(), tmp_path / "damaged")
    with open(tmp_path / "damaged" / "adapter_model.safetensors", "r+b") as file:
        file.truncate(1000)
    with pytest.raises(ValueError, match="cut off"):
        restore_adapter(model, tmp_path / "damaged")
    with pytest.raises(FileNotFoundError, match="nothing"):
        restore_adapter(model, tmp_path / "nothing")
    assert all(torch.equal(value, before[key]) for key, value in adapter(model).items())


# The model card ----------------------------------------------------------------------------------------------------


def card_of(path):
    """The front matter and the text."""
    _, head, text = path.read_text().split("---\n", 2)
    return yaml.safe_load(head), text


def test_the_card_tells_what_it_is_and_its_code_loads_it(tmp_path):
    base = BertForSequenceClassification(BERT)
    base.save_pretrained(tmp_path / "base")
    model = BertForSequenceClassification.from_pretrained(tmp_path / "base")
    flora.adapt(model, CONFIG)
    with torch.no_grad():
        model.bert.encoder.layer[0].attention.self.query.deltas["default"].core.normal_()
    flora.save_adapter(model, tmp_path / "my-adapter")
    path = write_model_card(
        model,
        tmp_path / "my-adapter",
        base_model=str(tmp_path / "base"),
        results={"accuracy": 0.912345, "examples": 1000, "data": "sentences | words"},
        tags=["text-classification"],
    )
    head, text = card_of(path)
    assert head == {
        "base_model": str(tmp_path / "base"),
        "library_name": "flora",
        "tags": ["flora", "tucker", "text-classification"],
    }
    report = flora.summary(model)
    assert f"{report.adapter_parameters:,} parameters" in text and f"flora {flora.__version__}" in text
    assert "| accuracy | 0.9123 |" in text and "| examples | 1000 |" in text and r"sentences \| words" in text
    assert "| `bert.encoder.layer.*.attention.self.query` (2) | 32×32 | tucker | 4×4 |" in text
    counts = [int(row.rsplit("|", 2)[1].replace(",", "")) for row in re.findall(r"^\| `.*", text, re.MULTILINE)]
    assert sum(counts) == report.adapter_parameters

    loading, expression = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert eval(expression, {"flora": flora}) == CONFIG
    ids = Examples().ids
    code = loading + "import json, sys\nprint(json.dumps(model(torch.tensor(json.load(sys.stdin))).logits.tolist()))"
    done = subprocess.run(
        [sys.executable, "-c", "import torch\n" + code],
        input=json.dumps(ids.tolist()),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = model.eval()(ids).logits
    torch.testing.assert_close(torch.tensor(json.loads(done.stdout)), expected)


def test_a_card_of_several_methods_on_any_model(tmp_path):
    config = {"0": flora.LoRAConfig(rank=2), "2": flora.RescaleConfig()}
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    flora.adapt(model, config, base_dtype=torch.bfloat16)
    flora.save_adapter(model, tmp_path)
    head, text = card_of(write_model_card(model, tmp_path))
    assert head == {"library_name": "flora", "tags": ["flora", "lora", "rescale"]}
    loading, expression = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert eval(expression, {"flora": flora}) == config
    names = {}
    exec(loading.replace(json.dumps(tmp_path.name), repr(str(tmp_path))), names)
    again = names["load"](nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)))
    assert flora.summary(again).adapters == ("default",)
    assert "## Results" not in text


def test_a_card_outlives_a_save(tmp_path):
    model = bert()
    flora.save_adapter(model, tmp_path / "adapter")
    path = write_model_card(model, tmp_path / "adapter")
    before = path.read_text()
    flora.save_adapter(model, tmp_path / "adapter")
    assert path.read_text() == before
    write_model_card(model, tmp_path / "adapter", results={"loss": 0.5})
    assert sorted(entry.name for entry in path.parent.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_a_card_needs_its_adapter(tmp_path):
    with pytest.raises(FileNotFoundError, match="no adapter in"):
        write_model_card(bert(), tmp_path)
    with pytest.raises(ValueError, match="no adapter 'other'"):
        write_model_card(bert(), tmp_path, "other")
    with pytest.raises(RuntimeError, match="no adapters"):
        write_model_card(nn.Linear(2, 2), tmp_path)
