"""Few-step and ODE samplers, stock-scheduler replay and export."""
