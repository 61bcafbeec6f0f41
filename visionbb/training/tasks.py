"""What a step of training minimises: one class a task, on timm's task package.

A task takes the model, the options, the device and, where there is one, the teacher; `TASKS` names them for the option
`task`. Its `forward(input, target)` returns a dict with the "loss", its checkpoints say what they belong to.
"""
from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from timm.layers import Attention
from timm.task import ClassificationTask, TrainingTask
from torch import Tensor, nn
from torch.nn.functional import kl_div, one_hot

from ..mixers import GlobalAttention, LinearAttention, SoftmaxAttention
from ..mixers.feature_maps import Polar
from ..models.drop_ins import inherit_attention
from ..reduction import ASViT, DynamicViT, budget_loss, ratio_loss
from ..reduction.models import family_for
from ..reduction.schedule import reduces
from .config import ConfigError, TrainConfig


class RecordedTask(TrainingTask):
    """A task of timm's whose checkpoints also say which model and options they belong to.

    They hold tensors and plain Python values only, so `torch.load(path, weights_only=True)` reads them.
    """

    config: TrainConfig

    def get_checkpoint_state(self, ema: bool = False, **kwargs: Any) -> dict[str, Any]:
        record = {"arch": self.config.model, "args": asdict(self.config)}
        return record | super().get_checkpoint_state(ema=ema, **kwargs)


class Taught(nn.Module):
    """What a task with a teacher is, too: the teacher stays as it is."""

    def take_teacher(self, teacher: nn.Module) -> None:
        self.teacher = teacher.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Taught:
        super().train(mode)
        self.teacher.eval()
        return self


class Classification(RecordedTask, ClassificationTask):
    """timm's classification task: the loss of the logits against the classes."""

    def __init__(self, model: nn.Module, config: TrainConfig, device: torch.device, teacher: None = None):
        super().__init__(
            model, device=device, verbose=False,
            criterion_kwargs={"loss_type": config.loss, "smoothing": config.smoothing, "soft_targets": config.mixes})
        self.config = config


class ReductionConsistency(Classification):
    """Token-reduction consistency: few tokens must say what more tokens say (MCTF, arXiv 2403.10030).

    Each batch goes twice through the one model: with its own r, and with a smaller r', drawn for each batch from
    0 ... max_r - 1, to which every block's r is cut. With the features f and g that the classifier reads in the two
    passes, the class token in most ViTs, the loss is

        CE(r) + CE(r') + weight * mean ||f - sg(g)||^2 / C,

    the mean over those images whose true class has a probability above 0.4 in the pass with r (above it together, the
    classes of mixed images), so that what is not learnt yet is not agreed on.

    Args:
        model: reduced by a method and a schedule of r.

    Raises:
        ConfigError: the model's schedule is not of r, or removes nothing; gradient checkpointing, which would repeat
            the second pass with the r of the first.
    """

    confidence = 0.4

    def __init__(self, model: nn.Module, config: TrainConfig, device: torch.device, teacher: None = None):
        super().__init__(model, config, device)
        if config.grad_checkpointing:
            raise ConfigError(f"grad_checkpointing must be off with task {config.task!r}")
        self.schedule = model.reducer.schedule
        if any(isinstance(entry, float) for entry in self.schedule) or not any(self.schedule):
            raise ConfigError(f"reduction must remove r tokens a block with task {config.task!r}, "
                              f"got {config.reduction}, which is the schedule {list(self.schedule)}")
        self.max_r = min(config.consistency_max_r or max(self.schedule), max(self.schedule))

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        model = self.trainable_module
        less = int(torch.randint(self.max_r, ()))
        with _inputs_of([model.get_classifier()]) as features:
            output = model(input)
            model.reducer.schedule = tuple(min(entry, less) for entry in self.schedule)
            try:
                more = model(input)
            finally:
                model.reducer.schedule = self.schedule
        distance = (features[0] - features[1].detach()).float().square().mean(-1)
        truth = one_hot(target, output.shape[-1]) if target.ndim == 1 else target > target.amin(-1, keepdim=True)
        sure = (output.detach().float().softmax(-1) * truth).sum(-1) > self.confidence
        agreement = (distance * sure).sum() / sure.sum().clamp(min=1)
        loss = self.criterion(output, target) + self.criterion(more, target)
        return {"loss": loss + self.config.consistency_weight * agreement, "output": output}


class ReductionBudget(Classification):
    """Learns with the classes how many tokens they need (AS-ViT, arXiv 2209.13802).

    To the classification loss comes, `budget_weight` times, how far the multiply-adds of the batch's mean image are
    from `budget_gmacs`: the gradient of the thresholds. The authors' 2 is for DeiT-S of 4.6 GMACs; a smaller model
    needs as much more for the same pull. The distillation that they add is not here.

    Args:
        model: reduced by "as_vit".

    Raises:
        ConfigError: the model is reduced by another method, which learns no number of tokens.
    """

    def __init__(self, model: nn.Module, config: TrainConfig, device: torch.device, teacher: None = None):
        super().__init__(model, config, device)
        if not isinstance(model.reducer.method, ASViT):
            raise ConfigError(f"reduction must be by method 'as_vit' with task {config.task!r}, "
                              f"got {config.reduction['method']!r}")

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        model, config = self.trainable_module, self.config
        output, state = model.forward_with_state(input)
        missed = budget_loss(model, state, config.budget_gmacs)
        return {"loss": self.criterion(output, target) + config.budget_weight * missed, "output": output}


class ReductionDistillation(Taught, Classification):
    """Learns with the classes which tokens they need, from a teacher that sees all (DynamicViT, arXiv 2106.02034).

    With logits y and normed patch tokens t of the last block, y' and t' those of the teacher, and M the tokens that
    stay to the end, the loss of an image is

        CE + ratio_weight * ratio_loss + distill_weight * (KL(y' || y) + mean over M of |t - t'|^2 / C),

    the last a mean over the tokens of all images. The authors' weights are 2 and 0.5, and their teacher is the model as
    it is without reduction. They train what is not predictor at a hundredth of the learning rate, after five epochs in
    which it stands still; here all learns at one rate.

    Args:
        model: reduced by "dynamic_vit", some tokens removed.
        teacher: a ViT as wide, with as many patches; timm's, or a column of this package.

    Raises:
        ConfigError: the model is reduced by another method, or not at all, or the teacher does not fit it.
    """

    def __init__(self, model: nn.Module, config: TrainConfig, device: torch.device, teacher: nn.Module):
        super().__init__(model, config, device)
        self.take_teacher(teacher)
        if not isinstance(model.reducer.method, DynamicViT) or not any(map(reduces, model.reducer.schedule)):
            raise ConfigError(f"reduction must be by method 'dynamic_vit' and remove tokens with task {config.task!r}, "
                              f"got {config.reduction}")
        try:
            self.family = family_for(teacher)
        except TypeError as error:
            raise ConfigError(f"kd_model_name {config.kd_model_name!r} must be a ViT: {error}") from error
        size = (config.img_size or 224,) * 2
        ours = model.num_features, *model.reducer.family.grid(model, size)
        theirs = teacher.num_features, *self.family.grid(teacher, size)
        if ours != theirs:
            raise ConfigError(f"kd_model_name {config.kd_model_name!r} must have the model's width and its rows and "
                              f"columns of patches (see kd_model_kwargs), {ours}, got {theirs}")

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        model, config = self.trainable_module, self.config
        with torch.no_grad():
            features = self.teacher.forward_features(input)
            wanted = self.teacher.forward_head(features).float()
            theirs = features.flatten(1, -2)[:, self.family.prefix(self.teacher) :]
        x, state, _ = model.forward_tokens(input)
        x = model.norm(x)
        output = model.reducer.family.head(model, x, state)
        agreement = kl_div(output.float().log_softmax(-1), wanted.log_softmax(-1), reduction="batchmean",
                           log_target=True)
        stays = state.record[-1].detach().float()
        apart = (x[:, state.prefix :] - theirs).float().square().mean(-1)
        agreement = agreement + (apart * stays).sum() / stays.sum()
        loss = self.criterion(output, target) + config.ratio_weight * ratio_loss(model, state)
        return {"loss": loss + config.distill_weight * agreement, "output": output}


class AttentionDistillation(Taught, RecordedTask):
    """Teaches the feature maps of a linear attention the attention maps of a ViT (Hedgehog, arXiv 2402.04347).

    The model becomes the teacher with another attention, `inherit_attention`. Its feature maps are then all that
    trains: with the softmax attention A of a block of the teacher and the weights A' that the linear attention gives
    the same tokens, which are those of the teacher, the loss is the cross-entropy

        - sum_j A_ij log A'_ij

    of a query, in the mean over queries, heads, blocks and images (section 4 there, "attention weight distillation").
    Its minimum is the entropy of the teacher's maps. Classes are not used. Maps are computed in float32, at a cost
    quadratic in the number of tokens.

    Args:
        model: a drop-in with a learned feature map, such as deit_*_hedgehog.
        teacher: a ViT as large, timm's or a drop-in, with softmax attention.

    Raises:
        ConfigError: the model's or the teacher's attention is of another kind, or the two do not fit.
    """

    def __init__(self, model: nn.Module, config: TrainConfig, device: torch.device, teacher: nn.Module):
        super().__init__(device=device, verbose=False)
        self.config = config
        self.trainable_module = model
        self.take_teacher(teacher)
        try:
            inherit_attention(model, teacher)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"model {config.model!r} cannot inherit from kd_model_name {config.kd_model_name!r} (see "
                              f"model_kwargs, kd_model_kwargs): {error}") from error
        pairs = [(block.mixer, theirs.mixer if hasattr(theirs, "mixer") else theirs.attn)
                 for block, theirs in zip(model.blocks, teacher.blocks, strict=True) if learns_weights(block.mixer)]
        if not pairs:
            raise ConfigError(f"model {config.model!r} has no linear attention with a learned feature map and "
                              f"normalizer 'div', which task {config.task!r} needs")
        self.learning, self.taught = zip(*pairs, strict=True)
        for attention in self.taught:
            if not isinstance(attention, (Attention, SoftmaxAttention)):
                raise ConfigError(f"kd_model_name {config.kd_model_name!r} must have softmax attention, timm's or "
                                  f"visionbb's, got {type(attention).__name__}")
        model.requires_grad_(False)
        for mixer in self.learning:
            mixer.feature_map.requires_grad_(True)

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        H, W = self.trainable_module.stem.patch_embed.dynamic_feat_size(input.shape[-2:])
        with torch.no_grad(), _inputs_of(attention.qkv for attention in self.taught) as inputs:
            self.teacher(input)
        losses = []
        with torch.autocast(input.device.type, enabled=False):
            for mixer, attention, x in zip(self.learning, self.taught, inputs, strict=True):
                x = x.flatten(1, -2).float()  # drop-ins hold a sequence as a map of one row
                with torch.no_grad():
                    wanted = attention_map(attention, x, H, W)
                losses.append(cross_entropy(mixer.attention_map(x, H, W), wanted))
        return {"loss": torch.stack(losses).mean()}


def cross_entropy(weights: Tensor, wanted: Tensor) -> Tensor:
    """Cross-entropy of distributions over the last dimension, the mean over all others."""
    return -(wanted * weights.clamp(min=torch.finfo(weights.dtype).tiny).log()).sum(-1).mean()


def attention_map(attention: Attention | GlobalAttention, x: Tensor, H: int, W: int) -> Tensor:
    """Softmax attention's weights of all pairs of tokens x (B, N, dim): (B, num_heads, N, N)."""
    if isinstance(attention, GlobalAttention):
        return attention.attention_map(x, H, W)
    qkv = attention.qkv(x).unflatten(-1, (3, attention.num_heads, attention.head_dim))
    q, k, _ = qkv.permute(2, 0, 3, 1, 4).unbind()
    q, k = attention.q_norm(q), attention.k_norm(k)
    return (q @ k.mT * attention.scale).softmax(-1)


def learns_weights(mixer: nn.Module) -> bool:
    """Whether the weights of its pairs of tokens are distributions that the parameters of a feature map move."""
    return (isinstance(mixer, LinearAttention) and mixer.normalizer == "div" and mixer.feature_map is not None
            and not isinstance(mixer.feature_map, Polar) and any(True for _ in mixer.feature_map.parameters()))


@contextmanager
def _inputs_of(modules: Iterable[nn.Module]) -> Iterator[list[Tensor]]:
    """Collects what the modules are called with, in the order of their calls."""
    inputs: list[Tensor] = []
    hooks = [module.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for module in modules]
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()


TASKS = {
    "classification": Classification,
    "attention_distillation": AttentionDistillation,
    "reduction_consistency": ReductionConsistency,
    "reduction_budget": ReductionBudget,
    "reduction_distillation": ReductionDistillation,
}
