"""What a report says about a search: lineage, figures and the values its template fills in."""
