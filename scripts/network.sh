# For .ci/run and scripts/fresh, which start with an empty environment: sets the array `network` to NAME=value of the variables
# that say how the network is reached. To be sourced.
network=()
while IFS= read -r name; do
    case "$name" in
        PIP_CACHE_DIR | PIP_NO_CACHE_DIR) ;; # a cache is what must not be there
        PIP_* | SSL_CERT_* | REQUESTS_CA_BUNDLE | NODE_EXTRA_CA_CERTS) network+=("$name=${!name}") ;;
        *) case "${name,,}" in
               http_proxy | https_proxy | all_proxy | no_proxy | npm_config_*) network+=("$name=${!name}") ;;
           esac ;;
    esac
done < <(compgen -e)
unset name
