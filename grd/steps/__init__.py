"""The two steps, Explorer and Researcher, as short orchestration."""
