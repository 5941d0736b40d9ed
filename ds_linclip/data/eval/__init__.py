"""Labelled images for evaluation: webdataset folders, ImageNet tars, class folders."""
