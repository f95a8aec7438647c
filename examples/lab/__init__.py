"""The parts of study.py: what is run, how one run goes, how many go side by side, and what is made of their records."""
