"""What people see: progress, tables, plots and the model card."""
