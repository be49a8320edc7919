"""The commands beside LightningCLI's own: each looks at a run before it is made, none trains."""
