"""``python -m flora finetune``: a pretrained network is fine-tuned, saved, loaded back and merged."""

from flora.finetune.demo import Job, Settings, prepare

__all__ = ["Job", "Settings", "prepare"]
