"""Back ends, which compute a step: foreach operations, torch's fused CPU kernels, or a Triton kernel."""
