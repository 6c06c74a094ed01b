# SPDX-License-Identifier: Apache-2.0
"""Ready LightningModules."""

from lightning_cl.modules.causal_lm import CausalLMModule

__all__ = ["CausalLMModule"]
