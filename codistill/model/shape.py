"""The sizes of a model that memory and time depend on, from its config.json alone."""

from dataclasses import dataclass

from torch import nn

from codistill.config import require
from codistill.model.pretrained import load_model_config, meta_model


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a causal language model."""

    parameters: int
    layers: int
    layer_parameters: int
    """Parameters of one decoder layer, on average."""
    largest_parameter: int
    """Numbers in the largest weight."""
    hidden: int
    intermediate: int
    """Width of the MLP; of a mixture, of all experts of a token together."""
    query_width: int
    """heads * head size"""
    key_width: int
    """key heads * head size"""
    heads: int
    norm_width: int
    """Numbers that the norms of one layer go over, per token."""
    vocab: int
    """Rows of the head."""
    is_tied: bool
    """Whether the head is the embedding."""

    @property
    def root_parameters(self) -> int:
        """Embedding, last norm and head."""
        return self.parameters - self.layers * self.layer_parameters

    @property
    def multiplied(self) -> int:
        """Weights that multiply each token: all but an embedding that only looks up."""
        return self.parameters - (0 if self.is_tied else self.vocab * self.hidden)


def model_shape(key: str, path: str) -> ModelShape:
    """The shape of the model in this folder or of this Hub name; no weight is loaded.

    Raises:
        ConfigError: under configuration key `key`, there is no model that is understood.
    """
    config = load_model_config(key, path)
    lm = meta_model(path)
    text = config.get_text_config()
    layers = lm.base_model.layers
    heads, head_size = text.num_attention_heads, head_size_of(text)
    return ModelShape(
        parameters=count(lm),
        layers=len(layers),
        layer_parameters=count(layers) // len(layers),
        largest_parameter=max(parameter.numel() for parameter in lm.parameters()),
        hidden=text.hidden_size,
        intermediate=mlp_width(text),
        query_width=heads * head_size,
        key_width=key_heads(text) * head_size,
        heads=heads,
        norm_width=norm_width(layers[0], text),
        vocab=lm.get_output_embeddings().weight.shape[0],
        is_tied=lm.get_output_embeddings().weight is lm.get_input_embeddings().weight,
    )


def check_split(key: str, parts: int, path: str) -> None:
    """Raise ConfigError under configuration key `key` unless vLLM can cut the model into so many
    equal parts; it copies key heads where there are fewer than parts."""
    if parts == 1:
        return
    text = load_model_config(key, path).get_text_config()
    heads, keys, width = text.num_attention_heads, key_heads(text), text.intermediate_size
    are_equal = heads % parts == 0 and width % parts == 0
    require(
        are_equal and max(keys, parts) % min(keys, parts) == 0,
        key,
        parts,
        f"a divisor of the {heads} heads and the MLP's {width} columns of {path}, and a divisor or "
        f"a multiple of its {keys} key heads",
    )


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def head_size_of(text_config) -> int:
    size = getattr(text_config, "head_dim", None)
    return size or text_config.hidden_size // text_config.num_attention_heads


def key_heads(text_config) -> int:
    return getattr(text_config, "num_key_value_heads", None) or text_config.num_attention_heads


def mlp_width(text_config) -> int:
    experts = getattr(text_config, "num_experts_per_tok", None)
    if experts is None:
        return text_config.intermediate_size
    return experts * getattr(text_config, "moe_intermediate_size", text_config.intermediate_size)


def norm_width(layer: nn.Module, text_config) -> int:
    """A norm as wide as a head goes over all query or key heads."""
    width, size = 0, head_size_of(text_config)
    for name, module in layer.named_modules():
        weight = getattr(module, "weight", None)
        if "norm" in name and weight is not None and weight.dim() == 1:
            is_of_heads = weight.numel() == size != text_config.hidden_size
            keys = key_heads(text_config) if "k_" in name else text_config.num_attention_heads
            width += weight.numel() * (keys if is_of_heads else 1)
    return width
