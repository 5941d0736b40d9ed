"""Configs of whole experiments (``train/``), and of DeepSpeed (``deepspeed/``)."""
