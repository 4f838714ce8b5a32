"""The forms that a layer's cache is given: what targets share here, a folder for each target."""
