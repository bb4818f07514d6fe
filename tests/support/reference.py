"""LARS, LAMB and AutoClip in float64 numpy, one layer at a time, in the letters of the papers."""

import math

import numpy as np


def norm(x):
    """Return |x|, scaled by the largest element first, so that no square overflows or underflows."""
    largest = float(np.max(np.abs(x), initial=0.0))
    if largest == 0.0 or not math.isfinite(largest):
        return largest
    return largest * math.sqrt(math.fsum((np.ravel(x) / largest) ** 2))


def gradient_scale(gradients, max_grad_norm):
    """Return what clipping by the norm of all finite gradients multiplies each gradient with."""
    if max_grad_norm is None:
        return 1.0
    total = norm(np.array([norm(g) for g in gradients if np.all(np.isfinite(g))]))
    return 1.0 if total == 0.0 else min(1.0, max_grad_norm / total)


def lars(
    w, g, state, *, lr, momentum=0.9, weight_decay=0.0, dampening=0.0, nesterov=False, trust_coefficient=1e-3,
    eps=1e-8, denominator="gradient", trust_clip=None, lr_in_momentum=False, decoupled_weight_decay=False,
    maximize=False, layer_adaptation=True,
):  # fmt: skip
    """Return w, the state, which is empty before the first step, and the trust ratio after one step."""
    v = state.get("momentum_buffer")

    def adapted(whole):
        if not layer_adaptation:
            return 1.0
        ratio = 1.0 if norm(w) == 0.0 or whole == 0.0 else trust_coefficient * norm(w) / (whole + eps)
        if trust_clip == "larc":
            return 1.0 if lr == 0.0 else min(ratio / lr, 1.0)
        return ratio if trust_clip is None else min(ratio, trust_clip)

    def accumulated(u):
        return u if v is None else momentum * v + (1.0 - dampening) * u

    def kept(v):
        return {} if v is None else {"momentum_buffer": v}

    g = -g if maximize else g
    if decoupled_weight_decay:
        w = (1.0 - lr * weight_decay) * w
        weight_decay = 0.0
    u = g + weight_decay * w

    if denominator == "momentum":
        direction = u
        if momentum:
            v = accumulated(u)
            direction = u + momentum * v if nesterov else v
        ratio = adapted(norm(direction))
        return w - lr * ratio * direction, kept(v), ratio

    whole = norm(g) + weight_decay * norm(w) if denominator == "gradient" else norm(u)
    ratio = adapted(whole)
    u = ratio * u
    if not momentum:
        return w - lr * u, {}, ratio
    if lr_in_momentum:
        u = lr * u
        v = accumulated(u)
        return w - (u + momentum * v if nesterov else v), kept(v), ratio
    v = accumulated(u)
    return w - lr * (u + momentum * v if nesterov else v), kept(v), ratio


def lamb(
    w, g, state, *, lr, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01, bias_correction=True,
    grad_averaging=True, decoupled_weight_decay=False, trust_clip=None, max_weight_norm=None, trust_eps=0.0,
    maximize=False, layer_adaptation=True,
):  # fmt: skip
    """Return w, the state, which is empty before the first step, and the trust ratio after one step."""
    beta1, beta2 = betas
    m, v = state.get("exp_avg", 0.0), state.get("exp_avg_sq", 0.0)
    t = state.get("step", 0) + 1
    g = -g if maximize else g
    if decoupled_weight_decay:
        w = (1.0 - lr * weight_decay) * w
        weight_decay = 0.0
    m = beta1 * m + ((1.0 - beta1) * g if grad_averaging else g)
    v = beta2 * v + (1.0 - beta2) * g * g
    m_hat = m / (1.0 - beta1**t) if bias_correction else m
    v_hat = v / (1.0 - beta2**t) if bias_correction else v
    u = m_hat / (np.sqrt(v_hat) + eps) + weight_decay * w

    ratio = 1.0
    if layer_adaptation:
        phi = norm(w) if max_weight_norm is None else min(norm(w), max_weight_norm)
        if norm(w) > 0.0 and norm(u) > 0.0:
            ratio = phi / (norm(u) + trust_eps)
        low, high = trust_clip if isinstance(trust_clip, tuple) else (0.0, trust_clip)
        ratio = max(ratio, low) if high is None else min(max(ratio, low), high)
    return w - lr * ratio * u, {"step": t, "exp_avg": m, "exp_avg_sq": v}, ratio


def autoclip(norms, percentile, history, starts_full=False):
    """Return threshold and scale of every step: Seetharaman et al. 2020, of a bounded history."""
    seen = []
    for norm in norms:
        if 0 < norm < math.inf:
            seen = ([norm] * history if starts_full and not seen else [*seen, norm])[-history:]
        threshold = np.percentile(seen, percentile) if seen else math.nan
        yield threshold, (threshold / norm if norm > threshold else 1.0)


def percentile_clipping(norms, percentile):
    """Return threshold and scale of every step, as bitsandbytes/functional.py and its kernel have it."""
    squares = np.zeros(100)
    for step, norm in enumerate(norms, start=1):
        if step == 1:
            squares[:] = norm**2
        squares[step % 100] = norm**2
        current, clip = math.sqrt(squares[step % 100]), math.sqrt(np.sort(squares)[percentile])
        yield clip, (clip / current if current > clip else 1.0)


def novograd(
    w, g, state, *, lr, betas=(0.95, 0.98), eps=1e-8, weight_decay=0.0, grad_averaging=False,
    decoupled_weight_decay=False, maximize=False, layer_adaptation=True,
):  # fmt: skip
    """Return w, the state, which is empty before the first step, and the factor on the gradient."""
    beta1, beta2 = betas
    v, m = state.get("exp_avg_sq", 0.0), state.get("exp_avg", 0.0)
    g = -g if maximize else g
    if decoupled_weight_decay:
        w = (1.0 - lr * weight_decay) * w
        weight_decay = 0.0
    factor = 1.0
    if layer_adaptation:
        v = norm(g) ** 2 if v == 0.0 else beta2 * v + (1.0 - beta2) * norm(g) ** 2
        factor = 1.0 if v == 0.0 else 1.0 / (math.sqrt(v) + eps)
    m = beta1 * m + (1.0 - beta1 if grad_averaging else 1.0) * (factor * g + weight_decay * w)
    return w - lr * m, {"exp_avg": m, "exp_avg_sq": v}, factor
