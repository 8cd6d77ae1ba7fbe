"""What the passes did to a layer or left as it was, and why: plain data."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CHANGE_REASONS", "DONE", "Change"]

# Reason code -> the sentence that a change shows. As in ``dwswap.report.REASONS``, whose codes may
# appear here as well, a code is never renamed.
CHANGE_REASONS: dict[str, str] = {
    # done
    "folded": "folded into the weights",
    "absorbed": "part of the operator's call now",
    "input_kept": "autograd needs its input, and copies it first where it is changed in place",
    "training_kernel": "a kernel of dwswap in training on CUDA",
    "pushed": "made up for by the bias of {count} layers after it",
    "epilogue": "added by the matrix product, which the convolution is, to what it stores",
    "product": "a matrix product: cuDNN may be slow where {channels} channels are no multiple of 8",
    "rows": "a kernel of dwswap that normalizes many pixels at once",
    "stem": "a kernel of dwswap for 3 x 3 taps on 3 channels",
    "separable": "one kernel of dwswap where pixels are few, on GPUs with clusters",
    # stays: BatchNorm
    "train_mode": "it is in train mode",
    "no_statistics": "it normalizes by the statistics of each batch",
    "no_convolution": "what it normalizes comes from no convolution or linear layer",
    "norm_type": "{type} is none of torch.nn's own BatchNorm1d, 2d and 3d",
    "rank_unknown": "whether its channels are those of the layer before it depends on the input's "
    "number of dimensions; example_inputs may tell",
    "channels": "its {norm} channels are not the {layer} of the layer before it",
    "dtypes": "it is {norm}, the layer before it {layer}",
    "devices": "its tensors and those of the layer before it are on different devices",
    "not_representable": "the folded weights leave the range of {dtype}",
    "activation_before": "the operator's call before it ends in an activation",
    # stays: activations and biases
    "unknown_activation": "the operator has no {activation}",
    "in_place": "it changes a value in place that may be read elsewhere",
    "changed_between": "a value may be changed in place before the convolution reads it",
    "asymmetric_padding": 'padding="same" is asymmetric here and excludes a change of the input',
    # stays: biases that cannot move on
    "not_linear": "{user} is not linear",
    "not_constant": "{user} pads its input, or depends on it in another way",
    "bias_there": "{user} would have a bias in its place",
    "overflow": "the bias of {user} would leave the range of its dtype",
    # stays: squeeze-and-excitation
    "no_pool": "it is computed from no mean over height and width",
    "other_input": "it scales another tensor than {value}, which is pooled",
    "not_image": "{value} may have more than four dimensions; example_inputs may tell",
    "gate": "its gate is {activation}, neither sigmoid nor hardsigmoid",
    "gates": "its {gates} gates are not one for each of the {channels} channels",
    "not_pointwise": "a convolution in it is not 1 x 1, or has groups or padding",
    # stays: all
    "other_users": "{value} is used elsewhere as well",
    "call_form": "the layer is not called in a form that can be rewritten",
    "computed": "its tensors are computed in the graph",
    "changed_in_graph": "its tensors are changed by the model's forward",
}


DONE = ("folded", "absorbed", "pushed", "epilogue", "product", "rows", "stem", "separable")
"""The reasons of what is gone from the graph."""


@dataclass(frozen=True)
class Change:
    """One neighbour of a convolution or linear layer, and what became of it.

    Attributes:
        kind: ``"batchnorm"``, ``"scale"`` of a constant factor, ``"layer"`` of a convolution that
            was folded into the next, ``"activation"``, ``"input_activation"``, ``"input_bias"``,
            ``"bias"`` of a layer that gave its own to those after it, or kept it,
            ``"squeeze_excitation"`` of the first layer of one, ``"pointwise"`` of a convolution
            that became a matrix product, ``"shuffle"`` or ``"pool"`` of one whose activation a
            channel shuffle or a mean took, ``"mean"`` of a linear layer that took the mean in
            front of it, ``"layer_norm"`` of a layer normalization,
            ``"stem"`` of the first convolution of a network, ``"separable"`` of a depthwise
            convolution that is one call with the pointwise one after it, or, in train mode,
            ``"inplace"`` of an activation, ``"batch_norm"`` of a BatchNorm and what is behind it or
            ``"excitation"`` of the pooling and the scaling of a squeeze-and-excitation.
        subject: what was folded, absorbed or left: the path of a module, or the name of a node.
        done: whether it is gone from the graph.
        reason: a key of :data:`CHANGE_REASONS`, or of ``dwswap.report.REASONS`` where a layer is
            not plain.
        detail: the reason as a sentence.
        name: of the activation, where the operator has it.
    """

    kind: str
    subject: str
    done: bool
    reason: str
    detail: str
    name: str | None = None

    def __str__(self) -> str:
        if not self.done and self.kind == "bias":
            return f"keeps its bias ({self.reason}: {self.detail})"
        if not self.done:
            return f"{self.subject} stays as it is ({self.reason}: {self.detail})"
        if self.kind in ("batchnorm", "layer", "scale"):
            return f"folded {self.subject}"
        if self.kind == "input_bias":
            return f"absorbed the bias of {self.subject}"
        if self.kind == "squeeze_excitation":
            return f"one call with {self.subject}, the pooling and the scaling"
        if self.kind == "pointwise":
            if self.reason == "product":
                return "became a matrix product"
            return "its bias in the epilogue of the matrix product"
        if self.kind == "batch_norm":
            behind = "" if self.name is None else f", and {self.name} after it"
            return f"runs {self.detail}{behind}"
        if self.kind in ("layer_norm", "stem", "excitation"):
            return f"runs {self.detail}"
        if self.kind == "separable":
            return f"one call with {self.subject} after it, {self.detail}"
        if self.kind == "inplace":
            return f"out of place ({self.reason}: {self.detail})"
        if self.kind == "shuffle":
            return f"{self.name} after it is part of the channel shuffle {self.subject}"
        if self.kind == "pool":
            return f"{self.name} after it is part of the mean {self.subject}"
        if self.kind == "mean":
            return f"absorbed the mean {self.subject} before it"
        if self.kind == "bias":
            return f"gave its bias to {self.subject}"
        side = "after" if self.kind == "activation" else "before"
        return f"absorbed {self.name} {side} it"
