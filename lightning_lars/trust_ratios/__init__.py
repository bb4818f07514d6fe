"""Statistics of every layer and step (trust ratios, norms, updates), as metrics, alerts, plots and tables.

Depends on torch only; `TrustRatioMonitor` and `ParamGroupSummary` build on it.
"""
