const take = (file) => {
  if (!file) return;
  if (file.size > props.most) {
    props.note = `This file has ${(file.size / 2 ** 20).toFixed(1)} MiB; ${(props.most / 2 ** 20).toFixed(1)} MiB are allowed.`;
    return;
  }
  const reader = new FileReader();
  reader.onload = () => { props.note = ""; props.value = reader.result; };
  reader.readAsDataURL(file);
};
element.addEventListener('click', (event) => {
  if (event.target.tagName !== 'INPUT') element.querySelector('input').click();
});
element.addEventListener('change', (event) => take(event.target.files && event.target.files[0]));
element.addEventListener('dragover', (event) => event.preventDefault());
element.addEventListener('drop', (event) => { event.preventDefault(); take(event.dataTransfer.files[0]); });
document.addEventListener('paste', (event) => take(event.clipboardData.files[0]));
