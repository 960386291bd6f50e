"""The Workplace Assistant: 27 tools over five databases of a company, as in WorkBench and NeMo Gym, without pandas."""
