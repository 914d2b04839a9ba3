"""Injected faults: see docs/reliability.md. The whole of it: bash scripts/test.sh --faults"""
