{{/* The labels of pods, and what selects them. */}}
{{- define "server" -}}
{app: server, app.kubernetes.io/instance: {{ .Release.Name | quote }}}
{{- end -}}
{{- define "engine" -}}
{app: engine, app.kubernetes.io/instance: {{ .Release.Name | quote }}}
{{- end -}}
{{- define "gateway" -}}
{app: gateway, app.kubernetes.io/instance: {{ .Release.Name | quote }}}
{{- end -}}
