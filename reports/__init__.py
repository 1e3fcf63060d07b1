"""HTML reports, figures and trace exports made from run directories."""
