"""Slow imports that are left out: what is used still works, and what was left out can be imported later."""
import subprocess
import sys

import pytest

from m2rl_core.profile import repo_root
from m2rl_core.slim import without


def fresh(code: str) -> str:
    """What a new interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], cwd=repo_root(), capture_output=True, text=True, check=True)
    return done.stdout


def test_left_out_inside_and_back_outside():
    assert "wave" not in sys.modules
    with without("wave", "json"):
        with pytest.raises(ImportError):
            import wave
        import json  # was loaded already, so it stays
        assert json.dumps([1]) == "[1]"
    import wave
    assert wave.open


def test_put_back_after_an_error():
    """Catches a module that can never be imported again because the import around it failed."""
    with pytest.raises(ZeroDivisionError), without("chunk_of_nothing"):
        1 / 0  # noqa: B018
    assert "chunk_of_nothing" not in sys.modules


def test_a_kernel_does_not_pay_for_what_it_never_uses():
    """Catches an import order that brings seconds back into each of the report's kernels."""
    said = fresh("import sys, m2rl_core.notebook, m2rl_core.models.policy, m2rl_core.domains.checkers as checkers\n"
                 "checkers.ids()\n"
                 "print([name for name in ('rfc3987_syntax', 'transformers.models.auto.modeling_auto', 'scipy.stats')\n"
                 "       if name in sys.modules])\n"
                 "from transformers import AutoModelForCausalLM, Qwen3Config\n"
                 "from scipy.stats import norm\n"
                 "print(AutoModelForCausalLM.from_config(Qwen3Config(\n"
                 "    hidden_size=8, intermediate_size=8, vocab_size=8, num_hidden_layers=1, num_attention_heads=1,\n"
                 "    num_key_value_heads=1, head_dim=8)).num_parameters() > 0)")
    assert said.split("\n")[:2] == ["[]", "True"]
