"""Labelled images for evaluation: webdataset folders, tars of classes, folders of classes."""
