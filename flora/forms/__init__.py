"""Forms: how each parametrisation makes ΔW and acts on activations, one file a family; `base.py` has what all share."""

from flora.forms.base import DenseForm, Form, Parts
from flora.forms.kronecker import KroneckerForm
from flora.forms.rescale import RescaleForm
from flora.forms.toeplitz import ToeplitzForm
from flora.forms.tucker import Tucker, TuckerForm

FORMS: dict[str, type[Form]] = {
    form.name: form for form in (DenseForm, KroneckerForm, RescaleForm, ToeplitzForm, TuckerForm)
}
"""The forms that the operators of `flora.library` know, by name."""

__all__ = [
    "FORMS",
    "DenseForm",
    "Form",
    "KroneckerForm",
    "Parts",
    "RescaleForm",
    "ToeplitzForm",
    "Tucker",
    "TuckerForm",
]
