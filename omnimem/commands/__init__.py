"""The commands of the project, one module each; every command works as `omnimem NAME` and as a script."""
