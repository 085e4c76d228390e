"""A LLaMA of transformers with two adapters: one for each task, switched by name, and the plain model in between."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import flora

torch.manual_seed(0)
# A small one, drawn at random, so that this runs anywhere; LlamaForCausalLM.from_pretrained(...) in earnest.
shape = LlamaConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
model = LlamaForCausalLM(shape)
counting = torch.arange(32).repeat(4, 1)
TASKS = {"up": counting, "down": counting.flip(1)}

config = flora.TuckerConfig(rank=8, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"], scale=2.0)
flora.adapt(model, config, name="up")
flora.add_adapter(model, config, name="down")

for name, tokens in TASKS.items():
    flora.set_adapter(model, name)  # this one is used and learns, the other one rests
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=5e-3)
    for _ in range(30):
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"{name}: loss {loss.item():.3f}")

model.eval()
with torch.no_grad():
    for name in TASKS:
        flora.set_adapter(model, name)
        losses = {task: model(input_ids=tokens, labels=tokens).loss.item() for task, tokens in TASKS.items()}
        print(f"adapter {name}: " + ", ".join(f"{task} {loss:.2f}" for task, loss in losses.items()))
    with flora.disabled(model):
        print(f"no adapter: up {model(input_ids=TASKS['up'], labels=TASKS['up']).loss.item():.2f}")
