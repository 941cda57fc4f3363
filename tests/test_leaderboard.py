"""leaderboard.py on result files in the harness's shape; each claim has a control that fails it.

Oracles: a real result (REAL, below), counts of discordant pairs, the shell, plain arithmetic.
What needs the harness itself is leaderboard.py --check, kept in results/leaderboard_check.txt.
"""

import copy
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import leaderboard as lb  # noqa: E402

# What lm_eval 0.4.13 wrote for two stand-in rows of GSM8K, a SmolLM2-135M-Instruct answering;
# left out: descriptions of the machine, the tokenizer and the task's prompt.
REAL = json.loads("""{
 "results": {"gsm8k": {"name": "gsm8k", "alias": "gsm8k", "sample_len": 2,
   "exact_match,strict-match": 0.5, "exact_match_stderr,strict-match": 0.5,
   "exact_match,flexible-extract": 1.0, "exact_match_stderr,flexible-extract": 0.0}},
 "group_subtasks": {},
 "configs": {"gsm8k": {"task": "gsm8k", "dataset_path": "openai/gsm8k", "num_fewshot": 5,
   "output_type": "generate_until",
   "generation_kwargs": {"until": ["Question:", "</s>", "<|im_end|>"],
    "do_sample": false, "temperature": 0.0}}},
 "versions": {"gsm8k": 3.0}, "n-shot": {"gsm8k": 5},
 "higher_is_better": {"gsm8k": {"exact_match": true}},
 "n-samples": {"gsm8k": {"original": 2, "effective": 2}},
 "config": {"model": "hf", "model_args": {"pretrained": "round-1", "dtype": "bfloat16"},
  "model_num_parameters": 134515008, "model_dtype": "torch.bfloat16", "model_revision": "main",
  "model_sha": "", "batch_size": "auto", "batch_sizes": [64], "use_cache": null, "limit": null,
  "bootstrap_iters": 100000, "gen_kwargs": {}, "random_seed": 0, "numpy_seed": 1234,
  "torch_seed": 1234, "fewshot_seed": 1234},
 "git_hash": null, "date": 1795556208.9558802, "transformers_version": "5.24.0",
 "lm_eval_version": "0.4.13", "upper_git_hash": null, "eot_token_id": 2, "max_length": 8192,
 "task_hashes": {"gsm8k": "b9d4dd1adf65d0fd1c4a6070a8c18bc330c150f9a0d76e31a033d5abbb1b7aa5"},
 "model_source": "hf", "model_name": "round-1", "model_name_sanitized": "round-1",
 "system_instruction": null, "system_instruction_sha": null, "fewshot_as_multiturn": null,
 "chat_template": null, "chat_template_sha": null,
 "total_evaluation_time_seconds": "26.81638836500042"
}""")
