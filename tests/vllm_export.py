"""Greedy tokens of vLLM and transformers from exported models: vllm_export.py FOLDER ..."""

import os
import sys

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}

import torch  # noqa: E402

torch._dynamo.config.disable = True  # vLLM would compile a helper of its sampler

from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402
from vllm import LLM, SamplingParams  # noqa: E402

PROMPTS = ["4+1=", "7+2=", "55+16+3="]
SETTINGS = dict(dtype="float32", max_model_len=32, kv_cache_memory_bytes=2**26, enforce_eager=True)

if __name__ == "__main__":
    for folder in sys.argv[1:]:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder)
        rows = [tokenizer.encode(prompt) for prompt in PROMPTS]
        expected = [
            model.generate(torch.tensor([row]), do_sample=False, max_new_tokens=8)[0, len(row) :]
            for row in rows
        ]
        llm = LLM(model=folder, **SETTINGS)
        greedy = SamplingParams(temperature=0, max_tokens=8)
        outputs = llm.generate([{"prompt_token_ids": row} for row in rows], greedy)
        found = [list(output.outputs[0].token_ids) for output in outputs]
        assert found == [ids.tolist() for ids in expected], (folder, found, expected)
        llm.llm_engine.engine_core.shutdown()
        del llm
