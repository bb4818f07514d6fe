"""What is known of every layer and step: trust ratios, norms, updates; as metrics, alerts, plots and tables.

Torch only: `TrustRatioMonitor` and `ParamGroupSummary` stand on it.
"""
