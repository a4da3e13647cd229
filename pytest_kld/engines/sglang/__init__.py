"""The engine of the mission: real SGLang servers. What runs inside them is `pytest_kld.hook`."""
