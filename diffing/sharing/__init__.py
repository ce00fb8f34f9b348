"""Results as others read them: tables, folders of Neuronpedia, repositories of the hub with a card."""
