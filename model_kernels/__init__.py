"""Fast forms of what model.py states plainly: each is tested equal to its plain form, forward and backward."""

from model_kernels.adam import Adam, cosine
from model_kernels.choice import KernelConfig, choose_kernels, chosen_kernels, kernels_of, use_kernels
from model_kernels.cuda import resolve_backend, run_mamba2
from model_kernels.mlp import FlatMLP, linear, run_frozen, run_mlp, run_mlp_with_gradients, run_regression
from model_kernels.opso import run_bank_logsumexp, run_causal_conv_silu, run_dual_form, run_gated_rms_norm
