"""What a model is worth and whether it is what it claims: for now the gate, which `hybridlm check` runs."""
