"""What vLLM loads into each worker of a server (`--worker-extension-cls`), before it makes the
engine that receives weights."""

from typing import Any

from vllm.config import set_current_vllm_config

from codistill.engine import transfer as transfer  # tells vLLM of the transfer by gloo
from codistill.engine.serve import sizes


class ServerExtension:
    """What POST /collective_rpc can call on each worker, besides vLLM's own methods."""

    vllm_config: Any
    weight_transfer_engine: Any
    _weight_update_active: bool

    def codistill_facts(self) -> dict[str, Any]:
        """What tells this server from one that a run cannot use; see `engine.server`."""
        model, transfer = self.vllm_config.model_config, self.vllm_config.weight_transfer_config
        return {
            "model": model.model,
            "sizes": sizes(model.hf_config),
            "dtype": str(model.dtype).removeprefix("torch."),
            "max_model_len": model.max_model_len,
            "logprobs_mode": model.logprobs_mode,
            "has_tokenizer": not model.skip_tokenizer_init,
            "rows": model.get_vocab_size(),
            "weight_transfer": transfer and transfer.backend,
            "workers": self.vllm_config.parallel_config.world_size_across_dp,
            "own_code": not model.using_transformers_backend(),
        }

    def codistill_reset(self) -> None:
        """End an update that an earlier run has left unfinished, and its connection."""
        self._weight_update_active = False
        with set_current_vllm_config(self.vllm_config):
            self.weight_transfer_engine.finish_weight_update()
        self.weight_transfer_engine.shutdown()
