"""What this machine is and can do: devices, card profiles, kernels, who started the process."""
