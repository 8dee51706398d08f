"""The sizes of a model that memory and time depend on, from its config.json alone."""

from dataclasses import dataclass

from torch import Tensor, nn

from codistill.config import require
from codistill.config.machinery import LoraConfig
from codistill.model.lora import adapted_layers, adapter_weights, add_adapters
from codistill.model.pretrained import load_model_config, meta_model

INNER = {"o_proj", "dense", "down_proj", "fc2", "c_proj"}
"""Names of linear layers that read what the others of their module make: attention's, the MLP's."""


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a causal language model."""

    weights: tuple[int, ...]
    """Numbers in each weight; tied ones count once."""
    adapters: tuple[int, ...]
    """Numbers in each A and B (LoRA); none in a model that learns all of its weights."""
    adapter_width: int
    """Rows of all A of one decoder layer, on average."""
    adapter_outputs: int
    """Rows of all B of one decoder layer, on average."""
    adapter_inputs: int
    """Numbers that the adapted layers of one decoder layer read per token, on average; what several
    of them read counts once."""
    layers: int
    layer_parameters: int
    """Parameters of one decoder layer, on average, without adapters."""
    expert_parameters: int
    """Parameters of the experts of a mixture, all layers together."""
    expert_share: float
    """Share of its experts that a token goes through; 1 where there are none."""
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
    def parameters(self) -> int:
        """Weights of the model, without adapters."""
        return sum(self.weights)

    @property
    def held(self) -> int:
        """Numbers of the model and its adapters."""
        return self.parameters + sum(self.adapters)

    @property
    def trained(self) -> int:
        """Numbers that learn: adapters, or all weights."""
        return sum(self.adapters) or self.parameters

    @property
    def layer_trained(self) -> int:
        """Numbers of one decoder layer that learn, on average."""
        return sum(self.adapters) // self.layers or self.layer_parameters

    @property
    def learning_inputs(self) -> int:
        """Numbers per token that are read by those linear layers of a decoder layer that learn; all
        of them read what two norms, attention and the MLP's product give."""
        everything = 2 * self.hidden + self.query_width + self.intermediate
        return self.adapter_inputs if self.adapters else everything

    @property
    def root_parameters(self) -> int:
        """Embedding, last norm and head."""
        return self.parameters - self.layers * self.layer_parameters

    @property
    def root_trained(self) -> int:
        """Numbers of embedding, last norm and head that learn; adapters are in layers alone."""
        return 0 if self.adapters else self.root_parameters

    def multiplied(self, tokens: float = 1) -> float:
        """Weights that a forward pass over so many tokens multiplies with any of them: all but an
        embedding that only looks up, and experts that no token chose. They choose at random here.
        """
        unread = 0 if self.is_tied else self.vocab * self.hidden
        return self.parameters - unread - self.expert_parameters * (1 - self.expert_share) ** tokens


def model_shape(key: str, path: str, lora: LoraConfig | None = None) -> ModelShape:
    """The shape of the model in this folder or of this Hub name; no weight is loaded.

    lora: the adapters that it is trained with.

    Raises:
        ConfigError: under configuration key `key`, there is no model that is understood, or it has
            no such layers to adapt.
    """
    config = load_model_config(key, path)
    lm = meta_model(path)
    text = config.get_text_config()
    layers = lm.base_model.layers
    heads, head_size = text.num_attention_heads, head_size_of(text)
    weights = tuple(weight.numel() for weight in lm.parameters())
    layer_parameters = count(layers) // len(layers)
    if lora is not None:
        add_adapters(lm, key, path, lora)
    adapters = adapter_weights(lm)
    return ModelShape(
        weights=weights,
        adapters=tuple(weight.numel() for weight in adapters.values()),
        adapter_width=adapter_rows(adapters, "lora_A") // len(layers),
        adapter_outputs=adapter_rows(adapters, "lora_B") // len(layers),
        adapter_inputs=adapter_inputs(lm) // len(layers),
        layers=len(layers),
        layer_parameters=layer_parameters,
        expert_parameters=sum(weight.numel() for weight in expert_weights(lm)),
        expert_share=expert_share(lm),
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


def adapter_rows(adapters: dict[str, Tensor], part: str) -> int:
    """Rows of all A (part lora_A) or of all B (lora_B)."""
    return sum(len(weight) for name, weight in adapters.items() if f".{part}." in name)


def adapter_inputs(lm: nn.Module) -> int:
    """Numbers that all adapted layers read per token. The layers of a module read the same ones,
    but for those of `INNER`."""
    widths: dict[tuple[str, bool], int] = {}
    for name, layer in adapted_layers(lm):
        module, _, own_name = name.rpartition(".")
        widths[module, own_name in INNER] = layer.in_features
    return sum(widths.values())


def expert_weights(lm: nn.Module) -> list[nn.Parameter]:
    """The weights of a mixture's experts, each of all experts of a layer, [experts, ...]."""
    return [
        weight
        for module in lm.modules()
        for weight in module.parameters(recurse=False)
        if weight.dim() == 3 and getattr(module, "num_experts", None) == len(weight)
    ]


def expert_share(lm: nn.Module) -> float:
    """Share of its experts that a token goes through; 1 in a model without experts."""
    experts = {len(weight) for weight in expert_weights(lm)}
    return lm.config.get_text_config().num_experts_per_tok / max(experts) if experts else 1.0


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
